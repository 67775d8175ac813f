// fused_resnet_C::checksum
#include "weight_checksum.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "conv.h"
#include "isa.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kPiece = int64_t{64} << 10;  // bytes for one thread at a time

void add(const void* data, int64_t bytes, Digest& digest) {
  kernels().checksum(static_cast<const unsigned char*>(data), bytes, digest);
}

// Memory without gaps, by pieces whose digests are then added in their order: the same for any number of
// threads.
void add_memory(const unsigned char* data, int64_t bytes, Digest& digest) {
  const int64_t pieces = ceil_div(bytes, kPiece);
  if (pieces <= 1) return add(data, bytes, digest);
  std::vector<Digest> digests(static_cast<size_t>(pieces));
  torch::stable::parallel_for(0, pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      add(data + piece * kPiece, std::min(kPiece, bytes - piece * kPiece), digests[piece]);
    }
  });
  add(digests.data(), pieces * int64_t(sizeof(Digest)), digest);
}

// Whether the elements fill one piece of memory, each its own place.
bool is_dense(const Tensor& t) {
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    if (t.size(dim) != 1) dims.push_back(dim);
  }
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return t.stride(a) < t.stride(b); });
  int64_t expected = 1;
  for (const int64_t dim : dims) {
    if (t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// Elements with gaps between them, or several in one place: gathered in their logical order.
void add_elements(const Tensor& t, Digest& digest) {
  const auto item = static_cast<int64_t>(t.element_size());
  const auto* data = static_cast<const unsigned char*>(t.const_data_ptr());
  std::vector<unsigned char> gathered(static_cast<size_t>(t.numel() * item));
  std::vector<int64_t> index(static_cast<size_t>(t.dim()), 0);
  int64_t offset = 0;
  for (int64_t i = 0; i < t.numel(); ++i) {
    std::memcpy(gathered.data() + i * item, data + offset * item, static_cast<size_t>(item));
    for (int64_t dim = t.dim() - 1; dim >= 0; --dim) {
      offset += t.stride(dim);
      if (++index[dim] < t.size(dim)) break;
      offset -= t.size(dim) * t.stride(dim);
      index[dim] = 0;
    }
  }
  add_memory(gathered.data(), t.numel() * item, digest);
}

Tensor checksum(const std::vector<Tensor>& tensors) {
  Tensor taken =
      torch::stable::empty({static_cast<int64_t>(tensors.size()), Digest::kLanes}, ScalarType::Long);
  auto* digests = static_cast<Digest*>(taken.mutable_data_ptr());
  for (size_t i = 0; i < tensors.size(); ++i) digests[i] = checksum_of(tensors[i]);
  return taken;
}

}  // namespace

Digest checksum_of(const Tensor& t) {
  Digest digest;
  std::vector<int64_t> layout{static_cast<int64_t>(t.element_size()), static_cast<int64_t>(t.scalar_type())};
  for (int64_t dim = 0; dim < t.dim(); ++dim) layout.insert(layout.end(), {t.size(dim), t.stride(dim)});
  add(layout.data(), static_cast<int64_t>(layout.size() * sizeof(int64_t)), digest);
  if (t.numel() == 0) return digest;
  if (is_dense(t)) {
    add_memory(static_cast<const unsigned char*>(t.const_data_ptr()),
               t.numel() * static_cast<int64_t>(t.element_size()), digest);
  } else {
    add_elements(t, digest);
  }
  return digest;
}

bool checksum_holds(const Tensor& taken, const Tensor& t) {
  check(taken.scalar_type() == ScalarType::Long && taken.numel() == Digest::kLanes && taken.is_contiguous(),
        "checksum", "what fused_resnet_C::checksum made of one tensor", shape_of(taken));
  return *static_cast<const Digest*>(taken.const_data_ptr()) == checksum_of(t);
}

}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("checksum", TORCH_BOX(&fused_resnet::cpu::checksum));
}
