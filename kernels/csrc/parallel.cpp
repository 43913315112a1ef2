#include "parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace gossamer {
namespace {

// The functions that GCC compiles `#pragma omp parallel` to; LLVM's and Intel's runtimes have them too.
struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread)() = nullptr;
    int (*threads)() = nullptr;
};

// Linking with -fopenmp would name one libgomp.so.1, while torch's wheels bring their own copy, in some releases under
// another name: two runtimes, two sets of threads for two cores. Asking the loaded libtorch_cpu.so and what it was linked
// with gives the very one that torch uses. Nothing is loaded here: without torch in the process there are no threads.
Runtime find() {
    Runtime found;
#if defined(__linux__)
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return found;
    void* parallel = dlsym(torch, "GOMP_parallel");
    void* thread = dlsym(torch, "omp_get_thread_num");
    void* threads = dlsym(torch, "omp_get_num_threads");
    if (parallel != nullptr && thread != nullptr && threads != nullptr) {
        found.parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(parallel);
        found.thread = reinterpret_cast<int (*)()>(thread);
        found.threads = reinterpret_cast<int (*)()>(threads);
    }
#endif
    return found;
}

const Runtime& runtime() {
    static const Runtime found = find();
    return found;
}

struct Region {
    void (*body)(void*, int);
    void* data;
    int parts;
};

// The runtime may give fewer threads than asked for, so parts are dealt out, not assumed.
void in_region(void* pointer) {
    const Region& region = *static_cast<const Region*>(pointer);
    const int threads = runtime().threads();
    for (int part = runtime().thread(); part < region.parts; part += threads) region.body(region.data, part);
}

}  // namespace

void run_parts(int parts, void (*body)(void*, int), void* data) {
    if (parts > 1 && runtime().parallel != nullptr) {
        Region region{body, data, parts};
        runtime().parallel(in_region, &region, static_cast<unsigned>(parts), 0);
        return;
    }
    for (int part = 0; part < parts; ++part) body(data, part);
}

const char* parallel_runtime() { return runtime().parallel != nullptr ? "openmp of torch" : "none"; }

}  // namespace gossamer
