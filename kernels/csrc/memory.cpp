#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gossamer {

void prefer_huge_pages(void* memory, std::int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kHuge = std::uintptr_t{1} << 21;
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const std::uintptr_t begin = (address + kHuge - 1) & ~(kHuge - 1);
    const std::uintptr_t end = (address + static_cast<std::uintptr_t>(size)) & ~(kHuge - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)size;
#endif
}

}  // namespace gossamer
