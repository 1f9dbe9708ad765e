#include "attention/paged_attention_rows.h"

namespace effllm {

void attention_rows_avx2(const AttentionTile& tile, int64_t first_row, int64_t num_rows, int begin,
                         int end) {
  update_rows<8>(tile, first_row, num_rows, begin, end);
}

}  // namespace effllm
