// The first process of an emulated machine (tools/avx512.sh): loads the modules that read its disk, in the order of their
// names, and has the disk's /run executed there.
#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int status) {
    printf("run ended with %d\n", status);
    fflush(stdout);
    for (;;) pause();  // a kernel whose first process ends panics over the last lines
}

static void must(int result, const char* what) {
    if (result == 0) return;
    perror(what);
    end(1);
}

static void load_modules(void) {
    glob_t found;
    glob("/modules/*.ko", 0, NULL, &found);
    for (size_t i = 0; i < found.gl_pathc; ++i) {
        must((int)syscall(SYS_finit_module, open(found.gl_pathv[i], O_RDONLY), "", 0), found.gl_pathv[i]);
    }
}

static void enter_disk(void) {
    while (access("/dev/sda", F_OK) != 0) usleep(100000);  // found by another thread of the kernel
    must(mount("/dev/sda", "/disk", "ext4", 0, ""), "mount /dev/sda");
    must(mount("none", "/disk/dev", "devtmpfs", 0, ""), "mount /dev");
    must(mount("none", "/disk/proc", "proc", 0, ""), "mount /proc");
    must(chroot("/disk") || chdir("/"), "chroot");
}

int main(void) {
    int status = 1;
    must(mount("none", "/dev", "devtmpfs", 0, ""), "mount /dev");
    load_modules();
    enter_disk();
    if (fork() == 0) {
        execl("/bin/sh", "sh", "/run", NULL);
        _exit(1);
    }
    wait(&status);
    end(status);
}
