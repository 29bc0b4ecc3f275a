#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rlhf {

bool offer_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_FREE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + page - 1) / page * page, end = (start + uintptr_t(bytes)) / page * page;
  return first >= end || madvise(reinterpret_cast<void*>(first), end - first, MADV_FREE) == 0;
#else
  (void)data, (void)bytes;
  return false;
#endif
}

}  // namespace rlhf
