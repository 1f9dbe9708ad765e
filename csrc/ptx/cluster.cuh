// Thread block clusters (sm_90): barrier, and reads of each other's shared memory.
#pragma once

#include <cstdint>

#include "ptx/mbarrier.cuh"

namespace effllm::ptx {

// All threads of all CTAs of the cluster; writes to shared memory before it are seen after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The same, but no write before it need be seen after it. Reads are over, as the values are there.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
}

// Arrives at the barrier that CTA `rank` has where this CTA has `barrier`. Says nothing about this
// thread's writes: released to the whole cluster they would cost a fence of the GPU.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [address];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// What CTA `rank` has where this CTA has `pointer`.
__device__ __forceinline__ float load_cluster_smem(const float* pointer, uint32_t rank) {
  float value;
  asm volatile(
      "{.reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [address];}"
      : "=f"(value)
      : "r"(smem_address(pointer)), "r"(rank)
      : "memory");
  return value;
}

// Puts a value where CTA `rank` has what is `smem` in this one, and counts its bytes on the barrier
// that is `barrier` there.
__device__ __forceinline__ void store_async_cluster(void* smem, uint64_t* barrier, uint32_t rank,
                                                    const float4& value) {
  asm volatile(
      "{.reg .b32 address, barrier;\n"
      "mapa.shared::cluster.u32 address, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
      "[address], {%3, %4, %5, %6}, [barrier];}" ::"r"(smem_address(smem)),
      "r"(smem_address(barrier)), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
}

__device__ __forceinline__ void store_async_cluster(void* smem, uint64_t* barrier, uint32_t rank,
                                                    const int4& value) {
  asm volatile(
      "{.reg .b32 address, barrier;\n"
      "mapa.shared::cluster.u32 address, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 "
      "[address], {%3, %4, %5, %6}, [barrier];}" ::"r"(smem_address(smem)),
      "r"(smem_address(barrier)), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

}  // namespace effllm::ptx
