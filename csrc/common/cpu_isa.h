// Which instruction set the CPU loops of this process use. The library itself is compiled for the
// oldest processor of its architecture; hot loops are compiled once more per ISA, in files whose
// name ends in the ISA's (`*_avx2.cpp`), and chosen here at run time.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace effllm {

// Each includes those before it.
enum class CpuIsa : int { kBaseline, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };

#if defined(__x86_64__)
inline constexpr bool kHasX86Isas = true;

// A process has to ask Linux for the tile registers, once.
inline bool may_use_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline CpuIsa widest_cpu_isa() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuIsa::kBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return CpuIsa::kAvx2;
  if (!__builtin_cpu_supports("avx512vnni")) return CpuIsa::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return CpuIsa::kAvx512Vnni;
  return may_use_amx() ? CpuIsa::kAmx : CpuIsa::kAvx512Bf16;
}
#else
inline constexpr bool kHasX86Isas = false;

inline CpuIsa widest_cpu_isa() { return CpuIsa::kBaseline; }
#endif

// The environment variable EFFLLM_CPU_ISA is an upper limit, so that any machine can run the paths
// of lesser ones.
inline CpuIsa allowed_cpu_isa() {
  const char* name = std::getenv("EFFLLM_CPU_ISA");
  const std::string value = name == nullptr ? "" : name;
  if (value == "baseline") return CpuIsa::kBaseline;
  if (value == "avx2") return CpuIsa::kAvx2;
  if (value == "avx512") return CpuIsa::kAvx512;
  if (value == "avx512vnni") return CpuIsa::kAvx512Vnni;
  if (value == "avx512bf16") return CpuIsa::kAvx512Bf16;
  if (value.empty() || value == "amx") return CpuIsa::kAmx;
  throw std::runtime_error(
      "effllm: EFFLLM_CPU_ISA must be baseline, avx2, avx512, avx512vnni, avx512bf16 or amx, got "
      "'" +
      value + "'");
}

// Read once: the first use decides for the process.
inline CpuIsa cpu_isa() {
  static const CpuIsa isa = std::min(widest_cpu_isa(), allowed_cpu_isa());
  return isa;
}

}  // namespace effllm
