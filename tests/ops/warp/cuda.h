// The matrix that a tensor map describes, in place of the driver's header.
#pragma once

#include <cstdint>

struct CUtensorMap {
  char* data;
  int64_t rows, row_bytes, stride_bytes;
  int box_rows, element_bytes;
};
