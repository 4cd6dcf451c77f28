// SPDX-License-Identifier: MIT
#include "cpu/columns.hpp"

#include <cstring>

namespace mscclpp_ep::cpu {

namespace {

SourceColumn describe(const TensorView& tensor) {
  if (!tensor) return {};
  const auto element = static_cast<std::int64_t>(itemSize(tensor.dtype));
  return {static_cast<const std::byte*>(tensor.data),
          static_cast<std::size_t>(tensor.shape[1] * element), tensor.strides[0] * element,
          tensor.strides[1] * element, static_cast<std::size_t>(element)};
}

}  // namespace

RowWriter::RowWriter(const DispatchRequest& request, const RowKernels& kernels)
    : kernels_(kernels),
      placement_(*request.placement),
      topk_(request.signature.topk),
      wideIndex_(request.signature.indexBytes == sizeof(std::int64_t)) {
  columns_[kRows] = describe(request.inputs.x);
  columns_[kRows].rowStride = static_cast<std::int64_t>(columns_[kRows].rowBytes);
  columns_[kScales] = describe(request.inputs.scales);
  columns_[kTopkIdx] = describe(request.inputs.topkIdx);
  columns_[kTopkWeights] = describe(request.inputs.topkWeights);
  if (request.cached == nullptr) columns_[kSourceIndex].rowBytes = sizeof(std::int32_t);
  const SourceColumn& scales = columns_[kScales];
  packedScales_ = scales.elementStride == static_cast<std::int64_t>(scales.elementBytes);
}

void RowWriter::write(const Target& target, std::int64_t token, std::int64_t ordinal) const {
  const std::int64_t row = target.firstRow + ordinal;
  if (row >= target.capacity) return;
  copyRow(target, kRows, token, row);
  if (rowBytes(kScales) != 0) {
    if (packedScales_) {
      copyRow(target, kScales, token, row);
    } else {
      writeScales(target.columns[kScales] + row * static_cast<std::int64_t>(rowBytes(kScales)),
                  token);
    }
  }
  if (rowBytes(kTopkIdx) != 0) {
    wideIndex_ ? writeTopk<std::int64_t>(target, token, row)
               : writeTopk<std::int32_t>(target, token, row);
  }
  if (rowBytes(kSourceIndex) != 0) {
    reinterpret_cast<std::int32_t*>(target.columns[kSourceIndex])[row] =
        static_cast<std::int32_t>(token);
  }
}

void RowWriter::copyRow(const Target& target, int column, std::int64_t token,
                        std::int64_t row) const {
  const SourceColumn& source = columns_[static_cast<std::size_t>(column)];
  const std::byte* in = source.data + token * source.rowStride;
  std::byte* out = target.columns[column] + row * static_cast<std::int64_t>(source.rowBytes);
  if (source.rowBytes >= kStreamedRowBytes && !target.cached[column]) {
    kernels_.streamCopy(out, in, source.rowBytes);
  } else {
    std::memcpy(out, in, source.rowBytes);
  }
}

void RowWriter::writeScales(std::byte* out, std::int64_t token) const {
  const SourceColumn& source = columns_[kScales];
  const std::byte* in = source.data + token * source.rowStride;
  for (std::size_t at = 0; at < source.rowBytes; at += source.elementBytes) {
    std::memcpy(out + at, in, source.elementBytes);
    in += source.elementStride;
  }
}

/// The receiver gets the choices that are its own, by local id.
template <typename Index>
void RowWriter::writeTopk(const Target& target, std::int64_t token, std::int64_t row) const {
  const auto* ids = reinterpret_cast<const Index*>(columns_[kTopkIdx].data) + token * topk_;
  const auto* weights = reinterpret_cast<const float*>(columns_[kTopkWeights].data) + token * topk_;
  auto* outIds = reinterpret_cast<Index*>(target.columns[kTopkIdx]) + row * topk_;
  auto* outWeights = reinterpret_cast<float*>(target.columns[kTopkWeights]) + row * topk_;
  for (std::int64_t k = 0; k < topk_; ++k) {
    const bool own = ids[k] >= 0 && placement_.owner(ids[k]) == target.rank;
    outIds[k] = own ? static_cast<Index>(placement_.localIndex(ids[k])) : Index{-1};
    outWeights[k] = own ? weights[k] : 0.0F;
  }
}

}  // namespace mscclpp_ep::cpu
