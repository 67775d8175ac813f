#include "conv.h"

#include <algorithm>

namespace fused_resnet::cpu {

ConvPlan cut(int64_t rows, int64_t best_rows, int64_t panels, int threads, bool weights_stay) {
  ConvPlan plan;
  plan.rows = rows;
  plan.panels = panels;
  plan.row_blocks = std::max<int64_t>(1, (rows + best_rows / 2) / best_rows);
  if (!weights_stay && plan.row_blocks <= threads) {
    plan.row_blocks = 1;  // each thread fetches its part of the weights, rather than all of them
  } else if (plan.row_blocks > 1) {
    plan.row_blocks = ceil_div(plan.row_blocks, threads) * threads;
  }
  plan.rows_per_block = ceil_div(rows, plan.row_blocks);
  plan.row_blocks = ceil_div(rows, plan.rows_per_block);
  // Too few blocks of rows for the threads: the output channels are shared out as well, and the input
  // transform, a small part of the work, is repeated.
  plan.k_blocks = std::min(panels, ceil_div(threads, plan.row_blocks));
  plan.panels_per_block = ceil_div(panels, plan.k_blocks);
  plan.k_blocks = ceil_div(panels, plan.panels_per_block);
  plan.scratch_floats = 0;
  return plan;
}

}  // namespace fused_resnet::cpu
