// Which kernel fp8_gemm takes on Hopper, and how its work is cut: host code alone. What bounds the
// kernels stands in ss_gemm_sm90.cuh.
#include <algorithm>
#include <cstdint>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "gemm/fp8_gemm_sm90.h"

namespace effllm {
namespace {

constexpr int64_t kAlignment = 16;  // bytes, of what TMA reads and writes

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0;
}

// Nanoseconds that a GEMM takes by a model, but for what all take: tiles and reductions, and stages
// of K at the rate at which a multiprocessor multiplies or loads them. Fitted to the choice between
// all plans for 12 layers of Llamas and DeepSeek-V3 and up to 4096 tokens on an H100 80GB HBM3: its
// choices were 0.5 % slower than the best plans, the worst one 16 %.
class TimeModel {
 public:
  TimeModel(const Fp8GemmParams& params, const Fp8GemmShape& shape, Fp8Summation summation,
            int num_sms)
      : tile_(shape.tile),
        stage_time_(shape.stage_time[static_cast<size_t>(summation)]),
        num_sms_(num_sms),
        k_tiles_(ceil_div<int64_t>(params.k, 128)),
        row_tiles_(ceil_div<int64_t>(tile_.token_rows ? params.m : params.n, tile_.rows())),
        col_tiles_(ceil_div<int64_t>(tile_.token_rows ? params.n : params.m, tile_.cols)) {}

  int64_t k_tiles() const { return k_tiles_; }

  // What it was fitted to: tiles neither half empty nor, for few tokens each, many; and no
  // neighbour all of whose rows are beyond the matrix, which makes TMA slow for the others, too.
  bool applies_to(int64_t m) const {
    const int tokens = tile_.tokens();
    return tokens <= std::max<int64_t>(16, 2 * m) &&
           (tokens > 64 || m <= (tokens == 64 ? 512 : tokens)) &&
           row_tiles_ % tile_.neighbours == 0;
  }

  double operator()(const SsGemmPlan& cut) const {
    const int64_t tiles = row_tiles_ / tile_.neighbours * col_tiles_;
    const int64_t pieces = cut.ctas / tile_.neighbours;
    const auto whole_time = [&](int64_t busy) {
      return kTile + static_cast<double>(k_tiles_) * stage_time(busy, tile_.neighbours);
    };
    double time = (tile_.ctas_per_sm > 1 ? kShared : 0) + (tile_.neighbours > 1 ? kNeighbours : 0);
    time += static_cast<double>(tiles / pieces) * whole_time(pieces * tile_.neighbours);
    int64_t rest = tiles % pieces;
    if (cut.slices == 1) return rest == 0 ? time : time + whole_time(rest * tile_.neighbours);
    const int cluster = cut.slices * tile_.neighbours;
    for (const int64_t clusters = pieces / cut.slices; rest > 0; rest -= clusters) {
      time += kReduce + kReduceSlice * cut.slices + kReduceValue * tile_.rows() * tile_.cols;
      time += static_cast<double>(ceil_div<int64_t>(k_tiles_, cut.slices)) *
              stage_time(std::min(rest, clusters) * cluster, cluster);
    }
    return time;
  }

 private:
  static constexpr double kShared = 2100, kNeighbours = 3800, kTile = 860, kReduce = 960,
                          kReduceSlice = 350, kReduceValue = 0.212, kStageBytesPerNanosecond = 67;

  // Large clusters are put on few multiprocessors, even where others are idle.
  double stage_time(int64_t busy, int cluster) const {
    const bool crowded = cluster >= 4 && busy * 11 > int64_t{num_sms_} * 8;
    const auto per_sm =
        static_cast<double>(std::max<int64_t>(ceil_div<int64_t>(busy, num_sms_), crowded ? 2 : 1));
    const double bytes = (tile_.cols + tile_.rows()) * 128;
    return per_sm * std::max<double>(stage_time_, bytes / kStageBytesPerNanosecond);
  }

  const SsGemmShape tile_;
  const int stage_time_, num_sms_;
  const int64_t k_tiles_, row_tiles_, col_tiles_;
};

}  // namespace

bool takes_fp8_gemm_sm90(const Fp8GemmParams& params, bool accurate) {
  const bool is_float = params.out_dtype == DType::kFloat32;
  if (is_float && accurate) return false;
  const int64_t out_row = params.n * (is_float ? 4 : 2);
  return params.k > 0 && params.k % kAlignment == 0 && is_aligned(params.x) &&
         params.stride_weight_n % kAlignment == 0 && is_aligned(params.weight) &&
         out_row % kAlignment == 0 && is_aligned(params.out);
}

bool takes_fp8_group_scales_sm90(const Fp8Scales& scales, int64_t m) {
  return scales.grouped && scales.dtype == DType::kFloat32 && (m == 1 || scales.stride_row == 1) &&
         scales.stride_group % (kAlignment / 4) == 0 && is_aligned(scales.data);
}

Fp8GemmPlan plan_fp8_gemm(const Fp8GemmParams& params, Fp8Summation summation, int num_sms,
                          const Fp8GemmResidency& residency) {
  Fp8GemmPlan best{};
  double best_time = 1e30;
  for (size_t index = 0; index < kFp8GemmShapes.size(); ++index) {
    const Fp8GemmShape& shape = kFp8GemmShapes[index];
    if (shape.stage_time[static_cast<size_t>(summation)] == 0) continue;
    const bool splits = shape.tile.splits();
    if (!splits && params.out_dtype == DType::kFloat32) continue;
    const TimeModel model(params, shape, summation, num_sms);
    if (!model.applies_to(params.m)) continue;
    for (const int slices : {1, 2, 3, 4, 6, 8}) {
      if (slices > model.k_tiles() || (slices > 1 && !splits)) break;
      if (slices * shape.tile.neighbours > kMaxClusterCtas) break;
      const int cluster = slices * shape.tile.neighbours;
      // Whole tiles leave room for the CTAs of the next kernel.
      const int clusters = std::min(residency[index][static_cast<size_t>(slices - 1)],
                                    slices == 1 ? num_sms / cluster : num_sms * 2);
      if (clusters == 0) continue;
      const SsGemmPlan cut{clusters * cluster, slices};
      const double time = model(cut);
      if (time < best_time) best_time = time, best = {index, cut};
    }
  }
  return best;
}

void launch_fp8_gemm_sm90(const Fp8GemmParams& params, bool accurate, int device,
                          cudaStream_t stream) {
  const int num_sms = device_attribute(cudaDevAttrMultiProcessorCount, device, "fp8_gemm");
  const auto run = [&](Fp8Summation summation, auto& known, auto residency, auto launch) {
    const Fp8GemmResidency resident = known.get(device, residency);
    launch(params, plan_fp8_gemm(params, summation, num_sms, resident), stream);
  };
  if (params.grouped()) {
    static PerDevice<Fp8GemmResidency> known;
    run(Fp8Summation::kScaled, known, fp8_gemm_residency_scaled, launch_fp8_gemm_scaled);
  } else if (accurate || params.m <= 64) {  // few tokens leave the time to be accurate
    static PerDevice<Fp8GemmResidency> known;
    run(Fp8Summation::kPlain, known, fp8_gemm_residency_plain, launch_fp8_gemm_plain);
  } else {
    static PerDevice<Fp8GemmResidency> known;
    run(Fp8Summation::kTensorCore, known, fp8_gemm_residency_tensor_core,
        launch_fp8_gemm_tensor_core);
  }
}

}  // namespace effllm
