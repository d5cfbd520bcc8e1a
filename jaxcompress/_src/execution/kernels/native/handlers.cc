// What XLA calls: the handlers of its foreign function interface, by its C interface alone.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "run.h"
#include "xla/ffi/api/c_api.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace jaxcompress {
namespace {

class XlaPool : public Pool {
 public:
  explicit XlaPool(const XLA_FFI_CallFrame& frame) : api_(frame.api), context_(frame.ctx) {
    XLA_FFI_ThreadPool_NumThreads_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE;
    args.ctx = context_;
    args.num_threads = &threads_;
    if (dropped(api_->XLA_FFI_ThreadPool_NumThreads(&args))) threads_ = 1;
  }
  int threads() const override { return static_cast<int>(threads_); }
  void schedule(void (*task)(void*), void* data) override {
    XLA_FFI_ThreadPool_Schedule_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
    args.ctx = context_;
    args.task = task;
    args.data = data;
    if (dropped(api_->XLA_FFI_ThreadPool_Schedule(&args))) task(data);
  }

 private:
  bool dropped(XLA_FFI_Error* error) const {
    if (error == nullptr) return false;
    XLA_FFI_Error_Destroy_Args args{};
    args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
    args.error = error;
    api_->XLA_FFI_Error_Destroy(&args);
    return true;
  }

  const XLA_FFI_Api* api_;
  XLA_FFI_ExecutionContext* context_;
  int64_t threads_ = 1;
};

// XLA asks a handler for the version it was built for by a call with this extension.
bool answers_metadata(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Extension_Base* extension = frame->extension_start;
  if (extension == nullptr || extension->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(extension)->metadata;
  metadata->api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return true;
}

XLA_FFI_Error* invalid(const XLA_FFI_CallFrame* frame, const char* message) {
  XLA_FFI_Error_Create_Args args{};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message;
  args.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
  return frame->api->XLA_FFI_Error_Create(&args);
}

const XLA_FFI_Buffer* argument(const XLA_FFI_CallFrame* frame, int64_t i) {
  return i < frame->args.size ? static_cast<const XLA_FFI_Buffer*>(frame->args.args[i]) : nullptr;
}

const XLA_FFI_Buffer* result(const XLA_FFI_CallFrame* frame) {
  return static_cast<const XLA_FFI_Buffer*>(frame->rets.rets[0]);
}

const void* attribute(const XLA_FFI_CallFrame* frame, const char* name, XLA_FFI_AttrType type) {
  for (int64_t i = 0; i < frame->attrs.size; ++i) {
    const XLA_FFI_ByteSpan* span = frame->attrs.names[i];
    if (span->len == std::strlen(name) && std::memcmp(span->ptr, name, span->len) == 0)
      return frame->attrs.types[i] == type ? frame->attrs.attrs[i] : nullptr;
  }
  return nullptr;
}

bool flag(const XLA_FFI_CallFrame* frame, const char* name) {
  const auto* scalar = static_cast<const XLA_FFI_Scalar*>(attribute(frame, name, XLA_FFI_AttrType_SCALAR));
  return scalar && scalar->dtype == XLA_FFI_DataType_S32 && *static_cast<const int32_t*>(scalar->value) != 0;
}

bool is_matrix(const XLA_FFI_Buffer* buffer) { return buffer && buffer->rank == 2; }

bool read_parameters(const XLA_FFI_Buffer* buffer, const WeightOnly& p, int64_t groups, Parameters& to) {
  if (!is_matrix(buffer)) return false;
  const int64_t along_k = buffer->dims[p.out_major], along_n = buffer->dims[!p.out_major];
  if ((along_k != 1 && along_k != groups) || (along_n != 1 && along_n != p.N)) return false;
  switch (buffer->dtype) {
    case XLA_FFI_DataType_F32: to.type = Type::kFloat32; break;
    case XLA_FFI_DataType_BF16: to.type = Type::kBfloat16; break;
    case XLA_FFI_DataType_U8: to.type = Type::kUint8; break;
    default: return false;
  }
  to.data = buffer->data;
  to.group_stride = along_k == 1 ? 0 : p.out_major ? 1 : along_n;
  to.output_stride = along_n == 1 ? 0 : p.out_major ? along_k : 1;
  return true;
}

XLA_FFI_Error* weight_only(XLA_FFI_CallFrame* frame) {
  // Behind x come its zero points, if it has any.
  const bool has_input_zeros = flag(frame, "has_input_zeros");
  const int64_t at = 1 + has_input_zeros;
  const XLA_FFI_Buffer *x = argument(frame, 0), *input_zeros = has_input_zeros ? argument(frame, 1) : nullptr,
                       *codes = argument(frame, at), *scale = argument(frame, at + 1), *zero = argument(frame, at + 2);
  const XLA_FFI_Buffer* y = result(frame);
  if (!is_matrix(x) || !is_matrix(codes) || !is_matrix(scale) || !is_matrix(y))
    return invalid(frame, "expected matrices");
  WeightOnly p{};
  p.out_major = flag(frame, "out_major");
  p.M = x->dims[0];
  p.K = x->dims[1];
  p.N = codes->dims[!p.out_major];
  const bool is_packed = flag(frame, "packed"), has_levels = flag(frame, "has_levels");
  p.is_signed = flag(frame, "signed");
  const bool has_whole_inputs = x->dtype == XLA_FFI_DataType_S8 && !has_levels;
  if ((x->dtype != XLA_FFI_DataType_F32 && !has_whole_inputs) || y->dtype != XLA_FFI_DataType_F32)
    return invalid(frame, "expected inputs of float32, or of int8 without levels, and outputs of float32");
  if (has_input_zeros && (!has_whole_inputs || !is_matrix(input_zeros) || input_zeros->dtype != XLA_FFI_DataType_S8 ||
                          input_zeros->dims[0] != p.M || input_zeros->dims[1] != 1))
    return invalid(frame, "expected one zero point of int8 for each row of inputs of int8");
  if (codes->dtype != (is_packed || !p.is_signed ? XLA_FFI_DataType_U8 : XLA_FFI_DataType_S8))
    return invalid(frame, "unexpected dtype of codes");
  if (codes->dims[p.out_major] != (is_packed ? (p.K + 1) / 2 : p.K))
    return invalid(frame, "the inputs do not fit the codes");
  if (y->dims[0] != p.M || y->dims[1] != p.N) return invalid(frame, "the outputs do not fit the codes");
  p.kind = !is_packed ? (p.is_signed ? Codes::kInt8 : Codes::kUint8) : has_levels ? Codes::kTable : Codes::kNibbles;
  p.groups = std::max<int64_t>(1, scale->dims[p.out_major]);
  if (zero) p.groups = std::max(p.groups, zero->dims[p.out_major]);
  if (p.K % p.groups || (p.groups > 1 && (p.K / p.groups) % 8))
    return invalid(frame, "groups are no multiples of 8 inputs");
  if (!read_parameters(scale, p, p.groups, p.scale)) return invalid(frame, "the scales do not fit the codes");
  if (zero && !read_parameters(zero, p, p.groups, p.zero))
    return invalid(frame, "the zero points do not fit the codes");
  const auto* levels = static_cast<const XLA_FFI_Array*>(attribute(frame, "levels", XLA_FFI_AttrType_ARRAY));
  if (has_levels && (!levels || levels->size != 16 || levels->dtype != XLA_FFI_DataType_F32))
    return invalid(frame, "expected 16 float32 levels");
  for (int i = 0; i < 16; ++i) p.table[i] = static_cast<float>(p.is_signed ? (i ^ 8) - 8 : i);
  if (has_levels) std::memcpy(p.table, levels->data, sizeof(p.table));
  p.x = static_cast<const float*>(x->data);
  p.codes = static_cast<const uint8_t*>(codes->data);
  p.y = static_cast<float*>(y->data);
  XlaPool pool(*frame);
  if (has_whole_inputs) {
    Grouped grouped{p.M, p.K, p.N, p.groups, p.out_major, p.is_signed, is_packed};
    grouped.x = static_cast<const int8_t*>(x->data);
    if (has_input_zeros) grouped.input_zeros = static_cast<const int8_t*>(input_zeros->data);
    grouped.codes = p.codes;
    grouped.scale = p.scale;
    grouped.zero = p.zero;
    grouped.y = p.y;
    run(grouped, pool);
    return nullptr;
  }
  run(p, pool);
  return nullptr;
}

XLA_FFI_Error* integer(XLA_FFI_CallFrame* frame) {
  const XLA_FFI_Buffer *x = argument(frame, 0), *codes = argument(frame, 1), *y = result(frame);
  if (!is_matrix(x) || !is_matrix(codes) || !is_matrix(y)) return invalid(frame, "expected matrices");
  Integer p{};
  p.out_major = flag(frame, "out_major");
  p.M = x->dims[0];
  p.K = x->dims[1];
  p.N = codes->dims[!p.out_major];
  p.is_signed = codes->dtype == XLA_FFI_DataType_S8;
  if (x->dtype != XLA_FFI_DataType_S8 || y->dtype != XLA_FFI_DataType_S32)
    return invalid(frame, "expected int8 inputs and int32 outputs");
  if (!p.is_signed && codes->dtype != XLA_FFI_DataType_U8) return invalid(frame, "unexpected dtype of codes");
  if (codes->dims[p.out_major] != p.K || y->dims[0] != p.M || y->dims[1] != p.N)
    return invalid(frame, "the shapes do not fit");
  p.x = static_cast<const int8_t*>(x->data);
  p.codes = static_cast<const uint8_t*>(codes->data);
  p.y = static_cast<int32_t*>(y->data);
  XlaPool pool(*frame);
  run(p, pool);
  return nullptr;
}

// Numbers of blocks in float32; those of bfloat16 are widened into `wide`, which XLA takes several times as long for.
bool read_blocks(const XLA_FFI_Buffer* buffer, const int32_t* sizes, const Expand& p, std::vector<float>& wide,
                 Blocks& to) {
  if (buffer->rank != 3 || buffer->dims[0] != p.entries) return false;
  to.data = static_cast<const float*>(buffer->data);
  if (buffer->dtype == XLA_FFI_DataType_BF16) {
    wide.resize(static_cast<size_t>(buffer->dims[0] * buffer->dims[1] * buffer->dims[2]));
    const auto* from = static_cast<const uint16_t*>(buffer->data);
    for (size_t i = 0; i < wide.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(&wide[i], &bits, sizeof(bits));
    }
    to.data = wide.data();
  } else if (buffer->dtype != XLA_FFI_DataType_F32) {
    return false;
  }
  to.row_blocks = buffer->dims[1];
  to.column_blocks = buffer->dims[2];
  to.row_size = sizes[0];
  to.column_size = sizes[1];
  // There is a block for every row and column.
  return to.row_blocks > 0 && to.row_size > 0 && to.column_size > 0 &&
         (p.columns + to.column_size - 1) / to.column_size <= to.column_blocks;
}

const XLA_FFI_Array* array_attribute(const XLA_FFI_CallFrame* frame, const char* name, int64_t size,
                                     XLA_FFI_DataType type) {
  const auto* array = static_cast<const XLA_FFI_Array*>(attribute(frame, name, XLA_FFI_AttrType_ARRAY));
  return array && static_cast<int64_t>(array->size) == size && array->dtype == type ? array : nullptr;
}

// Stored weights of p.entries x p.rows x p.columns: values, bits and starts or else places, perhaps something to wait
// for, and scales and zero points if there are any, from argument `first` on. The message of what does not fit, or null.
const char* read_weights(const XLA_FFI_CallFrame* frame, int64_t first, bool waits, Expand& p,
                         std::vector<float>* wide) {
  const auto* layout = array_attribute(frame, "layout", 4, XLA_FFI_DataType_S32);
  const auto* sizes = array_attribute(frame, "block_sizes", 4, XLA_FFI_DataType_S32);
  const auto* table = array_attribute(frame, "table", 16, XLA_FFI_DataType_F32);
  if (!layout || !sizes || !table) return "expected a layout, sizes of blocks and values of codes";
  const auto* number = static_cast<const int32_t*>(layout->data);
  if (number[0] < 0 || number[0] > 2) return "unknown layout";
  p.layout = static_cast<Layout>(number[0]);
  const bool has_mask = p.layout == Layout::kMask, is_across = p.layout == Layout::kAcrossRows;
  const XLA_FFI_Buffer *values = argument(frame, first), *bits = argument(frame, first + 1),
                       *starts = argument(frame, first + 2);
  const int64_t next = first + 2 + has_mask + waits;
  const XLA_FFI_Buffer *scale = argument(frame, next), *zero = argument(frame, next + 1);
  if (!bits || frame->args.size < next || values->rank != 3 || bits->rank != 3) return "expected stacks of matrices";
  if (values->dims[0] != p.entries || bits->dims[0] != p.entries || bits->dtype != XLA_FFI_DataType_U8)
    return "the parts do not fit";
  const bool is_packed = flag(frame, "packed");
  p.count = values->dims[is_across ? 1 : 2] * (is_packed ? 2 : 1);
  if (has_mask) {
    p.shards = values->dims[1];
    if (starts->rank != 2 || starts->dtype != XLA_FFI_DataType_S32 || starts->dims[0] != p.entries ||
        starts->dims[1] != p.rows || bits->dims[1] != p.rows || bits->dims[2] != (p.columns + 7) / 8)
      return "the mask does not fit";
    if (p.shards < 1 || p.rows % p.shards || p.count < 1) return "the values do not fit the rows";
    p.starts = static_cast<const int32_t*>(starts->data);
  } else {
    p.shards = 1;
    p.kept = number[1];
    p.run = number[2];
    p.place_bits = number[3];
    const int64_t along = is_across ? 1 : 2, other = is_across ? 2 : 1, size = is_across ? p.rows : p.columns;
    p.place_bytes = bits->dims[along];
    if (p.kept < 1 || p.kept > p.run || p.run > 256) return "expected 1 <= N <= M <= 256";
    if (p.place_bits != 1 && p.place_bits != 2 && p.place_bits != 4 && p.place_bits != 8) return "unexpected places";
    const int64_t stored = (size + p.run - 1) / p.run * p.kept, across = is_across ? p.columns : p.rows;
    if (p.count < stored || p.place_bytes * (8 / p.place_bits) < stored || values->dims[other] != across ||
        bits->dims[other] != across)
      return "the values or places do not fit";
  }
  switch (values->dtype) {
    case XLA_FFI_DataType_F32: p.stored = Stored::kWords; break;
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_BF16: p.stored = Stored::kHalves; break;
    case XLA_FFI_DataType_S8: p.stored = Stored::kInt8; break;
    case XLA_FFI_DataType_U8: p.stored = is_packed ? Stored::kNibbles : Stored::kUint8; break;
    default: return "unexpected dtype of values";
  }
  const bool needs_scale = p.stored != Stored::kHalves && p.stored != Stored::kWords;
  if (scale ? p.stored == Stored::kHalves : needs_scale) return "unexpected scales";
  const auto* size = static_cast<const int32_t*>(sizes->data);
  if ((scale && !read_blocks(scale, size, p, wide[0], p.scale)) || (zero && !read_blocks(zero, size + 2, p, wide[1], p.zero)))
    return "the scales or zero points do not fit";
  std::memcpy(p.table, table->data, sizeof(p.table));
  p.values = static_cast<const uint8_t*>(values->data);
  p.bits = static_cast<const uint8_t*>(bits->data);
  return nullptr;
}

XLA_FFI_Error* expand(XLA_FFI_CallFrame* frame) {
  const XLA_FFI_Buffer *values = argument(frame, 0), *out = result(frame);
  if (!values || out->rank != 3) return invalid(frame, "expected stacks of matrices");
  Expand p{};
  p.entries = out->dims[0];
  p.rows = out->dims[1];
  p.columns = out->dims[2];
  std::vector<float> wide[2];
  if (const char* reason = read_weights(frame, 0, true, p, wide)) return invalid(frame, reason);
  const bool is_raw = p.stored == Stored::kHalves || (p.stored == Stored::kWords && !p.scale.data);
  if (out->dtype != (is_raw ? values->dtype : XLA_FFI_DataType_F32))
    return invalid(frame, "unexpected dtype of the result");
  p.out = static_cast<uint8_t*>(out->data);
  XlaPool pool(*frame);
  run(p, pool);
  return nullptr;
}

XLA_FFI_Error* sparse_product(XLA_FFI_CallFrame* frame) {
  const XLA_FFI_Buffer *x = argument(frame, 0), *y = result(frame);
  if (!is_matrix(x) || !is_matrix(y)) return invalid(frame, "expected matrices");
  if (x->dtype != XLA_FFI_DataType_F32 || y->dtype != XLA_FFI_DataType_F32 || x->dims[0] != y->dims[0])
    return invalid(frame, "expected float32 inputs and outputs, of as many rows");
  SparseProduct p{};
  p.sums_columns = flag(frame, "sums_columns");
  p.M = x->dims[0];
  p.weights.entries = 1;
  p.weights.rows = p.sums_columns ? y->dims[1] : x->dims[1];
  p.weights.columns = p.sums_columns ? x->dims[1] : y->dims[1];
  std::vector<float> wide[2];
  if (const char* reason = read_weights(frame, 1, false, p.weights, wide)) return invalid(frame, reason);
  if (p.weights.stored == Stored::kHalves) return invalid(frame, "expected float32 values or codes");
  p.x = static_cast<const float*>(x->data);
  p.y = static_cast<float*>(y->data);
  XlaPool pool(*frame);
  run(p, pool);
  return nullptr;
}

}  // namespace
}  // namespace jaxcompress

EXPORT XLA_FFI_Error* jaxcompress_weight_only(XLA_FFI_CallFrame* frame) {
  return jaxcompress::answers_metadata(frame) ? nullptr : jaxcompress::weight_only(frame);
}

EXPORT XLA_FFI_Error* jaxcompress_integer(XLA_FFI_CallFrame* frame) {
  return jaxcompress::answers_metadata(frame) ? nullptr : jaxcompress::integer(frame);
}

EXPORT XLA_FFI_Error* jaxcompress_expand(XLA_FFI_CallFrame* frame) {
  return jaxcompress::answers_metadata(frame) ? nullptr : jaxcompress::expand(frame);
}

EXPORT XLA_FFI_Error* jaxcompress_sparse_product(XLA_FFI_CallFrame* frame) {
  return jaxcompress::answers_metadata(frame) ? nullptr : jaxcompress::sparse_product(frame);
}

EXPORT int jaxcompress_instruction_level() { return jaxcompress::instruction_level(); }

EXPORT void jaxcompress_limit_instructions(int level) { jaxcompress::limit_instructions(level); }
