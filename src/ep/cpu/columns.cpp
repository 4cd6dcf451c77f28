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
  if (target.firstRow + ordinal >= target.capacity) return;
  copyRow(target, kRows, token, ordinal);
  if (rowBytes(kScales) != 0) {
    if (packedScales_) {
      copyRow(target, kScales, token, ordinal);
    } else {
      const std::int64_t row = target.rowOf(kScales, ordinal);
      writeScales(target.columns[kScales] + row * static_cast<std::int64_t>(rowBytes(kScales)),
                  token);
    }
  }
  if (rowBytes(kTopkIdx) != 0) {
    wideIndex_ ? writeTopk<std::int64_t>(target, token, ordinal)
               : writeTopk<std::int32_t>(target, token, ordinal);
  }
  if (rowBytes(kSourceIndex) != 0) {
    auto* sources = reinterpret_cast<std::int32_t*>(target.columns[kSourceIndex]);
    sources[target.rowOf(kSourceIndex, ordinal)] = static_cast<std::int32_t>(token);
  }
}

void RowWriter::copyRow(const Target& target, int column, std::int64_t token,
                        std::int64_t ordinal) const {
  const SourceColumn& source = columns_[static_cast<std::size_t>(column)];
  const std::byte* in = source.data + token * source.rowStride;
  std::byte* out = target.columns[column] +
                   target.rowOf(column, ordinal) * static_cast<std::int64_t>(source.rowBytes);
  if (source.rowBytes >= kStreamedRowBytes && !target.lands[column]) {
    kernels_.streamCopy(out, in, source.rowBytes);
  } else {
    kernels_.copy(out, in, source.rowBytes);
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
void RowWriter::writeTopk(const Target& target, std::int64_t token, std::int64_t ordinal) const {
  const auto* ids = reinterpret_cast<const Index*>(columns_[kTopkIdx].data) + token * topk_;
  const auto* weights = reinterpret_cast<const float*>(columns_[kTopkWeights].data) + token * topk_;
  auto* outIds =
      reinterpret_cast<Index*>(target.columns[kTopkIdx]) + target.rowOf(kTopkIdx, ordinal) * topk_;
  auto* outWeights = reinterpret_cast<float*>(target.columns[kTopkWeights]) +
                     target.rowOf(kTopkWeights, ordinal) * topk_;
  for (std::int64_t k = 0; k < topk_; ++k) {
    const bool own = ids[k] >= 0 && placement_.owner(ids[k]) == target.rank;
    outIds[k] = own ? static_cast<Index>(placement_.localIndex(ids[k])) : Index{-1};
    outWeights[k] = own ? weights[k] : 0.0F;
  }
}

}  // namespace mscclpp_ep::cpu
