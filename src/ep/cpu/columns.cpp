// SPDX-License-Identifier: MIT
#include "cpu/columns.hpp"

#include <cstring>

#include "cpu/integrity.hpp"

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

SumType sumType(DataType dtype) {
  switch (dtype) {
    case DataType::bfloat16:
      return SumType::bfloat16;
    case DataType::float16:
      return SumType::float16;
    default:
      return SumType::float32;
  }
}

RowWriter::RowWriter(const DispatchRequest& request, const Context& context)
    : context_(context),
      kernels_(context.kernels),
      placement_(*request.placement),
      topk_(request.signature.topk),
      wideIndex_(request.signature.indexBytes == sizeof(std::int64_t)) {
  columns_[kRows] = describe(request.inputs.x);
  columns_[kRows].rowStride = static_cast<std::int64_t>(columns_[kRows].rowBytes);
  columns_[kScales] = describe(request.inputs.scales);
  columns_[kTopkIdx] = describe(request.inputs.topkIdx);
  columns_[kTopkWeights] = describe(request.inputs.topkWeights);
  if (request.cached == nullptr) columns_[kSourceIndex].rowBytes = sizeof(std::int32_t);
  if (context.integrity) {
    columns_[kChecksum].rowBytes = sizeof(RowSeal::checksum);
    columns_[kSequenceTag].rowBytes = sizeof(RowSeal::tag);
  }
  const SourceColumn& scales = columns_[kScales];
  packedScales_ = scales.elementStride == static_cast<std::int64_t>(scales.elementBytes);
}

void RowWriter::write(const Target& target, std::int64_t token, std::int64_t ordinal,
                      std::uint64_t sum) const {
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
  if (context_.integrity) writeSeal(target, token, ordinal, sum);
}

std::uint64_t RowWriter::checksumOf(std::int64_t token) const {
  const SourceColumn& rows = columns_[kRows];
  const SourceColumn& scales = columns_[kScales];
  const std::uint64_t sum = checksum(rows.data + token * rows.rowStride, rows.rowBytes);
  if (packedScales_ || scales.rowBytes == 0) {
    return checksum(scales.data + token * scales.rowStride, scales.rowBytes, sum);
  }
  std::vector<std::byte> packed(scales.rowBytes);
  writeScales(packed.data(), token);
  return checksum(packed.data(), packed.size(), sum);
}

void RowWriter::writeSeal(const Target& target, std::int64_t token, std::int64_t ordinal,
                          std::uint64_t sum) const {
  if (target.rank == context_.rank()) return;
  if (rowBytes(kTopkIdx) != 0) {
    sum = wideIndex_ ? addTopk<std::int64_t>(sum, target.rank, token)
                     : addTopk<std::int32_t>(sum, target.rank, token);
  }
  auto* sums = reinterpret_cast<std::uint64_t*>(target.columns[kChecksum]);
  auto* tags = reinterpret_cast<std::uint64_t*>(target.columns[kSequenceTag]);
  sums[target.rowOf(kChecksum, ordinal)] = sum;
  tags[target.rowOf(kSequenceTag, ordinal)] = packTag(context_.rank(), token, context_.epoch);
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
RowWriter::Choice<Index> RowWriter::choiceFor(int rank, std::int64_t token, std::int64_t k) const {
  const Index id = reinterpret_cast<const Index*>(columns_[kTopkIdx].data)[token * topk_ + k];
  if (id < 0 || placement_.owner(id) != rank) return {Index{-1}, 0.0F};
  const auto* weights = reinterpret_cast<const float*>(columns_[kTopkWeights].data);
  return {static_cast<Index>(placement_.localIndex(id)), weights[token * topk_ + k]};
}

template <typename Index>
void RowWriter::writeTopk(const Target& target, std::int64_t token, std::int64_t ordinal) const {
  auto* outIds =
      reinterpret_cast<Index*>(target.columns[kTopkIdx]) + target.rowOf(kTopkIdx, ordinal) * topk_;
  auto* outWeights = reinterpret_cast<float*>(target.columns[kTopkWeights]) +
                     target.rowOf(kTopkWeights, ordinal) * topk_;
  for (std::int64_t k = 0; k < topk_; ++k) {
    const Choice<Index> choice = choiceFor<Index>(target.rank, token, k);
    outIds[k] = choice.id;
    outWeights[k] = choice.weight;
  }
}

template <typename Index>
std::uint64_t RowWriter::addTopk(std::uint64_t sum, int rank, std::int64_t token) const {
  for (std::int64_t k = 0; k < topk_; ++k) {
    const Choice<Index> choice = choiceFor<Index>(rank, token, k);
    sum = addChoice(sum, choice.id, choice.weight);
  }
  return sum;
}

}  // namespace mscclpp_ep::cpu
