// Finds the OpenMP runtime of the process and hands teams to it. `GOMP_parallel` is the entry point that
// GCC's own code calls; LLVM's and Intel's runtimes export it too. The lookup happens once, after Python has
// imported torch.
#include "parallel.h"

#include <initializer_list>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#define BITWRIGHT_HAS_DLSYM 1
#endif

namespace bitwright {
namespace {

struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
};

#if defined(BITWRIGHT_HAS_DLSYM)
OpenMp find_in(void* library) {
    OpenMp omp;
    omp.thread_num = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
    omp.num_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
    if (omp.thread_num != nullptr && omp.num_threads != nullptr) {
        omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(library, "GOMP_parallel"));
    }
    return omp;
}

OpenMp find_openmp() {
    OpenMp omp = find_in(RTLD_DEFAULT);
    if (omp.parallel != nullptr) return omp;
    // Loaded, but with private symbols: ask for it by name without loading anything new.
    for (const char* name : {"libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.so.5", "libomp.dylib"}) {
        void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
        if (library == nullptr) continue;
        omp = find_in(library);
        if (omp.parallel != nullptr) return omp;
    }
    return omp;
}
#else
OpenMp find_openmp() { return {}; }
#endif

const OpenMp& openmp() {
    static const OpenMp found = find_openmp();
    return found;
}

struct Team {
    void (*fn)(void*, int, int);
    void* context;
};

void member(void* data) {
    const Team& team = *static_cast<const Team*>(data);
    team.fn(team.context, openmp().thread_num(), openmp().num_threads());
}

}  // namespace

void run_team(int threads, void (*fn)(void*, int, int), void* context) {
    if (threads <= 1 || openmp().parallel == nullptr) {
        fn(context, 0, 1);
        return;
    }
    Team team{fn, context};
    openmp().parallel(member, &team, static_cast<unsigned>(threads), 0);
}

}  // namespace bitwright
