// The kernels that quantise rows, also such as they make first, on lanes that take turns;
// test_code_rows.py compiles it, and calls it with tensors.
#include "quant/code_rows.cuh"

#include <cstdint>
#include <optional>

#include "common/dispatch.h"
#include "quant/fp8_encode.cuh"
#include "quant/fp8_quantize.h"
#include "quant/int8_encode.cuh"
#include "quant/int8_quantize.h"
#include "quant/int8_quantize_asymmetric.cuh"
#include "quant/quantize_rows.cuh"
#include "quant/rms_norm_rows.cuh"
#include "quant/silu_mul_rows.cuh"
#include "tensor_argument.h"

namespace {

using effllm::CodeRows;
using effllm::RowsLaunch;
using effllm::View;

template <class Params>
void run_blocks(const RowsLaunch& grid, void (*kernel)(Params), const Params& params) {
  for (int64_t block = 0; block < grid.blocks; ++block) {
    warp::block.x = static_cast<unsigned>(block);
    warp::run([&] { kernel(params); }, static_cast<unsigned>(grid.threads));
  }
}

std::optional<int64_t> optional(int64_t group_size) {
  return group_size < 0 ? std::nullopt : std::optional(group_size);
}

// Calls run(element, slots) for the kernel that a launch is of.
template <class Run>
int dispatch(const CodeRows& rows, const RowsLaunch& grid, const Run& run) {
  effllm::dispatch_float(rows.dtype, [&](auto element) {
    effllm::dispatch_slots<decltype(element)>(grid.slots, [&](auto slots) { run(element, slots); });
  });
  return grid.slots;
}

template <class Scale, bool kAdd>
int run_rms_norm(const effllm::RmsNormParams& params) {
  const RowsLaunch grid = effllm::rms_norm_rows_launch(params);
  return dispatch(params.rows, grid, [&](auto element, auto slots) {
    run_blocks(grid, effllm::rms_norm_rows_kernel<Scale, decltype(element), slots(), kAdd>, params);
  });
}

template <class Scale>
int run_rms_norm(const TensorArgument* tensors, double eps, int64_t group_size, void* codes,
                 void* scales, void* residual_out) {
  const View x = *tensors[0].view(), weight = *tensors[2].view();
  const std::optional<View> residual = tensors[1].view();
  effllm::RmsNormParams params = effllm::check_rms_norm_rows(
      "rms_norm", x, residual, weight, tensors[3].view(), eps, optional(group_size));
  CodeRows& rows = params.rows;
  params.x = effllm::strided_rows(x);
  if (residual) params.residual = effllm::strided_rows(*residual);
  params.residual_out = residual_out;
  rows.codes = static_cast<uint8_t*>(codes);
  rows.scales = static_cast<float*>(scales);
  return residual ? run_rms_norm<Scale, true>(params) : run_rms_norm<Scale, false>(params);
}

template <class Scale>
int run_silu_mul(const TensorArgument* tensors, int64_t group_size, void* codes, void* scales) {
  const View gate = *tensors[0].view(), up = *tensors[1].view();
  effllm::SiluMulParams params = effllm::check_silu_mul_rows(
      "silu_mul", gate, up, tensors[2].view(), optional(group_size));
  CodeRows& rows = params.rows;
  params.gate = effllm::strided_rows(gate);
  params.up = effllm::strided_rows(up);
  rows.codes = static_cast<uint8_t*>(codes);
  rows.scales = static_cast<float*>(scales);
  const RowsLaunch grid = effllm::silu_mul_rows_launch(params);
  return dispatch(rows, grid, [&](auto element, auto slots) {
    run_blocks(grid, effllm::silu_mul_rows_kernel<Scale, decltype(element), slots()>,
               effllm::SiluMulKernelParams{params, grid.pieces});
  });
}

template <class Scale>
void find_codes(const float* x, int64_t count, float scale, uint8_t* codes) {
  const Scale by = Scale::of(scale);
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(effllm::code_of(x[i], by));
}

template <class Scale>
int run_quantize(effllm::QuantizeRowsParams params, const View& x, void* codes, void* scales) {
  CodeRows& rows = params.rows;
  params.x = effllm::strided_rows(x);
  rows.codes = static_cast<uint8_t*>(codes);
  rows.scales = static_cast<float*>(scales);
  const RowsLaunch grid = effllm::quantize_rows_launch(params);
  return dispatch(rows, grid, [&](auto element, auto slots) {
    run_blocks(grid, effllm::quantize_rows_kernel<Scale, decltype(element), slots()>,
               effllm::QuantizeRowsKernelParams{params, grid.pieces});
  });
}

}  // namespace

// Codes of `count` numbers by one scale, and silu of them, as the kernels find these.

extern "C" void e4m3_codes(const float* x, int64_t count, float scale, uint8_t* codes) {
  find_codes<effllm::E4m3Scale>(x, count, scale, codes);
}

extern "C" void int8_codes(const float* x, int64_t count, float scale, uint8_t* codes) {
  find_codes<effllm::Int8Scale>(x, count, scale, codes);
}

extern "C" void silu_values(const float* g, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = effllm::device_silu(g[i]);
}

// Tensors in the order of the schemas, a group size of -1 for None. Return the slots of the kernel.

extern "C" int fp8_quantize_rows(const TensorArgument* tensors, int64_t group_size, void* codes,
                                 void* scales) {
  const View x = *tensors[0].view();
  const auto params = effllm::check_fp8_quantize(x, optional(group_size));
  return run_quantize<effllm::E4m3Scale>(params, x, codes, scales);
}

extern "C" int int8_quantize_rows(const TensorArgument* tensors, void* codes, void* scales) {
  const View x = *tensors[0].view();
  const auto params = effllm::check_int8_quantize(x, tensors[1].view());
  return run_quantize<effllm::Int8Scale>(params, x, codes, scales);
}

extern "C" int int8_quantize_asymmetric_rows(const TensorArgument* tensors, void* codes,
                                             void* scales, void* zeros) {
  const View x = *tensors[0].view();
  auto params = effllm::check_int8_quantize_asymmetric(x);
  CodeRows& rows = params.rows;
  params.x = effllm::strided_rows(x);
  rows.codes = static_cast<uint8_t*>(codes);
  rows.scales = static_cast<float*>(scales);
  params.zeros = static_cast<int8_t*>(zeros);
  const RowsLaunch grid = effllm::asymmetric_rows_launch(params);
  return dispatch(rows, grid, [&](auto element, auto slots) {
    run_blocks(grid, effllm::int8_quantize_asymmetric_kernel<decltype(element), slots()>, params);
  });
}

extern "C" int silu_mul_fp8_rows(const TensorArgument* tensors, int64_t group_size, void* codes,
                                 void* scales) {
  return run_silu_mul<effllm::E4m3Scale>(tensors, group_size, codes, scales);
}

extern "C" int silu_mul_int8_rows(const TensorArgument* tensors, int64_t group_size, void* codes,
                                  void* scales) {
  return run_silu_mul<effllm::Int8Scale>(tensors, group_size, codes, scales);
}

extern "C" int rms_norm_fp8_rows(const TensorArgument* tensors, double eps, int64_t group_size,
                                 void* codes, void* scales, void* residual_out) {
  return run_rms_norm<effllm::E4m3Scale>(tensors, eps, group_size, codes, scales, residual_out);
}

extern "C" int rms_norm_int8_rows(const TensorArgument* tensors, double eps, int64_t group_size,
                                  void* codes, void* scales, void* residual_out) {
  return run_rms_norm<effllm::Int8Scale>(tensors, eps, group_size, codes, scales, residual_out);
}
