// What the host data structures call a token.
#pragma once

#include <cstdint>

namespace effllm {

using Token = int64_t;

}  // namespace effllm
