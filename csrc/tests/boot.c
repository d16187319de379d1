// The first process of an emulated machine (tools/avx512.sh): runs the test program and says how it ended.
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void) {
    int status = 1;
    if (fork() == 0) {
        execl("/self_test", "self_test", CASES, NULL);
        _exit(1);
    }
    wait(&status);
    printf("self_test ended with %d\n", status);
    fflush(stdout);
    for (;;) pause();  // a kernel whose first process ends panics over the last lines
}
