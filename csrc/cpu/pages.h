#pragma once
#include <cstdint>

namespace rlhf {

// Lets the system take the pages that lie wholly within these bytes back, if it comes to need them before they are
// written again. Until then their content is anything. False where there is no such thing.
bool offer_pages(void* data, int64_t bytes);

}  // namespace rlhf
