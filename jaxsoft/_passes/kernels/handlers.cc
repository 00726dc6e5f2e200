// The passes as calls that XLA makes: what was checked in Python is checked again, seen
// as (outer, classes, inner), and given to the loops for this processor, on the threads
// that XLA has.

#include <string>
#include <string_view>
#include <vector>

#include "rows.h"
#include "workers.h"
#include "xla/ffi/api/ffi.h"

namespace jaxsoft {
namespace {

using Dimensions = ffi::Span<const int64_t>;
using RunJob = void (*)(const Job&, Workers&);

RunJob for_this_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return run_for_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return run_for_avx2;
#endif
  return run_for_any;
}

// The axes [first_class, end_of_classes) of the logits are those of the classes.
struct Layout {
  Dimensions dimensions;
  size_t first_class;
  size_t end_of_classes;

  int64_t product(size_t begin, size_t end) const {
    int64_t product = 1;
    for (size_t i = begin; i < end; ++i) product *= dimensions[i];
    return product;
  }

  Shape shape() const {
    return {product(0, first_class), product(first_class, end_of_classes),
            product(end_of_classes, dimensions.size())};
  }
};

// Reads the operands and results of a call, and remembers the first mistake.
class Reader {
 public:
  Reader(const char* name, ffi::AnyBuffer x, int64_t first_class, int64_t class_axes)
      : name_(name), x_(x), layout_{x.dimensions(), 0, 0} {
    int64_t rank = static_cast<int64_t>(x.dimensions().size());
    if (first_class < 0 || class_axes < 1 || first_class + class_axes > rank) {
      fail("the class axes must be axes of the logits");
      return;
    }
    layout_.first_class = first_class;
    layout_.end_of_classes = first_class + class_axes;
    job.shape = layout_.shape();
    job.in_double = x.element_type() == ffi::F64;
    job.x = array(x, number_of(x.element_type()), Extent::kLogits);
  }

  Job job;

  ffi::Error error() const {
    if (message_.empty()) return ffi::Error::Success();
    return ffi::Error::InvalidArgument(std::string(name_) + ": " + message_);
  }

  // The operand with this letter in `operands`, which names all of them in order.
  void operand(char letter, ffi::AnyBuffer buffer) {
    switch (letter) {
      case 'w':
        expect(buffer.element_type() == ffi::PRED, "the mask must be boolean");
        job.where = array(buffer, Number::kFloat, Extent::kBroadcast);
        return;
      case 't':
        job.temperature = per_row(buffer);
        return;
      case 'v':
        job.values =
            array(buffer, number_of(buffer.element_type()), Extent::kBroadcast);
        return;
      case 'q':
        if (!expect(job.coefficient_count < kMaxCoefficients, "too many coefficients"))
          return;
        job.coefficients[job.coefficient_count++] =
            array(buffer, number_of(buffer.element_type()), Extent::kBroadcast);
        return;
      case 'l':
        expect(buffer.element_type() == ffi::S32, "labels must be int32");
        job.labels = array(buffer, Number::kFloat, Extent::kRows);
        return;
      case 'm':
        job.m = per_row(buffer);
        return;
      case 's':
        job.scale = per_row(buffer);
        return;
      case 'a':
        job.at_label = per_row(buffer);
        return;
      default:
        fail("an operand of an unknown kind");
    }
  }

  void classes_result(ffi::Result<ffi::AnyBuffer> buffer) {
    expect(buffer->dimensions() == layout_.dimensions,
           "a result must be like the logits");
    job.classes_out = buffer->untyped_data();
    job.classes_out_number = number_of(buffer->element_type());
    expect_large_writes(job.classes_out, buffer->size_bytes());
  }

  void* row_result(ffi::Result<ffi::AnyBuffer> buffer) {
    expect(is_of_sums(buffer->element_type()), "a result per row must be of sums");
    expect(static_cast<int64_t>(buffer->element_count()) == job.shape.rows(),
           "a result must have a number per row");
    return buffer->untyped_data();
  }

  bool expect(bool holds, const char* what) {
    if (!holds) fail(what);
    return holds;
  }

 private:
  enum class Extent { kLogits, kBroadcast, kRows };

  void fail(const char* what) {
    if (message_.empty()) message_ = what;
  }

  bool is_of_sums(ffi::DataType type) const {
    return type == (job.in_double ? ffi::F64 : ffi::F32);
  }

  Number number_of(ffi::DataType type) {
    bool is_double = type == ffi::F64;
    expect(is_double == job.in_double, "all operands must be double, or none");
    if (is_double) return Number::kDouble;
    if (type == ffi::BF16) return Number::kBfloat16;
    if (type == ffi::F16) return Number::kHalf;
    expect(type == ffi::F32, "numbers must be floating-point");
    return Number::kFloat;
  }

  Array per_row(ffi::AnyBuffer buffer) {
    expect(is_of_sums(buffer.element_type()), "numbers per row must be of sums");
    return array(buffer, Number::kFloat, Extent::kRows);
  }

  // With the class axes, each of size 1, where an operand per row leaves them out.
  std::vector<int64_t> dimensions_of(ffi::AnyBuffer buffer, Extent extent) const {
    Dimensions own = buffer.dimensions();
    std::vector<int64_t> all(own.begin(), own.end());
    if (extent == Extent::kRows && own.size() >= layout_.first_class)
      all.insert(all.begin() + static_cast<int64_t>(layout_.first_class),
                 layout_.end_of_classes - layout_.first_class, 1);
    return all;
  }

  bool fits(Dimensions dimensions, Extent extent) const {
    if (dimensions.size() != layout_.dimensions.size()) return false;
    for (size_t i = 0; i < dimensions.size(); ++i) {
      bool is_class = i >= layout_.first_class && i < layout_.end_of_classes;
      int64_t whole = extent == Extent::kRows && is_class ? 1 : layout_.dimensions[i];
      bool may_be_one = extent != Extent::kLogits;
      if (dimensions[i] != whole && !(may_be_one && dimensions[i] == 1)) return false;
    }
    return true;
  }

  // The stride over these axes as one, 0 if the operand is broadcast over all of them.
  int64_t stride_over(Dimensions dimensions, size_t begin, size_t end, int64_t step) {
    int64_t own = 1, whole = layout_.product(begin, end);
    for (size_t i = begin; i < end; ++i) own *= dimensions[i];
    expect(own == 1 || own == whole, "an operand is broadcast over some class axes");
    return own == 1 ? 0 : step;
  }

  // Outer axes that are neighbours become one where their strides allow it.
  void add_group(Array& array, int64_t size, int64_t stride) {
    int last = array.groups - 1;
    if (size == 1) return;
    if (last >= 0 && array.group_stride[last] == size * stride) {
      array.group_size[last] *= size;
      array.group_stride[last] = stride;
      return;
    }
    if (!expect(array.groups < kMaxGroups, "an operand has too many axes")) return;
    array.group_size[array.groups] = size;
    array.group_stride[array.groups++] = stride;
  }

  Array array(ffi::AnyBuffer buffer, Number number, Extent extent) {
    Array array;
    std::vector<int64_t> all = dimensions_of(buffer, extent);
    Dimensions own(all.data(), all.size());
    array.data = buffer.untyped_data();
    array.number = number;
    if (!expect(fits(own, extent), "an operand does not broadcast to the logits"))
      return array;
    size_t rank = own.size();
    auto step = [&](size_t axis) {
      int64_t product = 1;
      for (size_t i = axis; i < rank; ++i) product *= own[i];
      return product;
    };
    array.inner_stride = stride_over(own, layout_.end_of_classes, rank, 1);
    array.class_stride = stride_over(own, layout_.first_class, layout_.end_of_classes,
                                     step(layout_.end_of_classes));
    for (size_t i = 0; i < layout_.first_class; ++i)
      add_group(array, layout_.dimensions[i], own[i] == 1 ? 0 : step(i + 1));
    return array;
  }

  const char* name_;
  ffi::AnyBuffer x_;
  Layout layout_;
  std::string message_;
};

using Operands = ffi::RemainingArgs;
using Results = ffi::RemainingRets;

// The results per row of a summary, in the order in which they are asked for.
void summary_results(Reader& reader, std::string_view names, const Results& results) {
  Job& job = reader.job;
  int totals = 0, belows = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!reader.expect(result.has_value(), "a result is missing")) return;
    void* data = reader.row_result(*result);
    switch (names[i]) {
      case 'm':
        job.m_out = data;
        break;
      case 's':
        job.s_out = data;
        break;
      case 'e':
        job.e_d_out = data;
        job.with_e_d = true;
        break;
      case 'z':
        job.logit_out = data;
        break;
      case 'q':
        if (reader.expect(totals < kMaxCoefficients, "too many results"))
          job.total_out[totals++] = data;
        break;
      case 'b':
        if (reader.expect(belows < kMaxCoefficients, "too many results"))
          job.below_out[belows++] = data;
        break;
      case 'v':
        job.value_out = data;
        break;
      case 'd':
        job.deviation_out = data;
        break;
      case 'o':
        job.others_out = data;
        break;
      case 'r':
        job.to_rows_out = data;
        break;
      case 'a':
        job.at_label_out = data;
        break;
      default:
        reader.expect(false, "a result of an unknown kind");
    }
  }
}

bool is_complete(const Job& job) {
  bool ok = !job.logit_out || job.labels;
  switch (job.pass) {
    case Pass::kSoftmaxPull:
    case Pass::kLogSoftmaxPull:
    case Pass::kLogSoftmaxPush:
      return ok && job.values;
    case Pass::kToClasses:
      return ok && job.m && job.scale && !job.labels == !job.at_label;
    case Pass::kToRows:
      return ok && job.m && job.values;
    default:
      return ok && !job.m;
  }
}

ffi::Error call(const char* name, Pass pass, ffi::ThreadPool pool, int64_t first_class,
                int64_t class_axes, std::string_view operand_names,
                std::string_view result_names, ffi::AnyBuffer x, Operands operands,
                Results results) {
  static const RunJob run = for_this_processor();
  Reader reader(name, x, first_class, class_axes);
  reader.job.pass = pass;
  for (size_t i = 0; i < operand_names.size(); ++i) {
    auto operand = operands.get<ffi::AnyBuffer>(i);
    if (!reader.expect(operand.has_value(), "an operand is missing")) break;
    reader.operand(operand_names[i], *operand);
  }
  if (result_names.empty()) {
    auto result = results.get<ffi::AnyBuffer>(0);
    if (reader.expect(result.has_value(), "a result is missing"))
      reader.classes_result(*result);
  } else {
    summary_results(reader, result_names, results);
  }
  reader.expect(is_complete(reader.job), "an operand of the pass is missing");
  if (ffi::Error error = reader.error(); error.failure()) return error;
  if (reader.job.shape.rows() == 0) return ffi::Error::Success();
  PoolWorkers workers(pool);
  run(reader.job, workers);
  return ffi::Error::Success();
}

template <Pass kPass>
constexpr const char* kName = nullptr;
template <>
constexpr const char* kName<Pass::kSoftmax> = "softmax";
template <>
constexpr const char* kName<Pass::kLogSoftmax> = "log_softmax";
template <>
constexpr const char* kName<Pass::kSoftmaxPull> = "softmax_pull";
template <>
constexpr const char* kName<Pass::kLogSoftmaxPull> = "log_softmax_pull";
template <>
constexpr const char* kName<Pass::kLogSoftmaxPush> = "log_softmax_push";
template <>
constexpr const char* kName<Pass::kToClasses> = "to_classes";
template <>
constexpr const char* kName<Pass::kToRows> = "to_rows";
template <>
constexpr const char* kName<Pass::kSummary> = "summary";

template <Pass kPass>
ffi::Error handle(ffi::ThreadPool pool, int64_t first_class, int64_t class_axes,
                  std::string_view operand_names, std::string_view result_names,
                  ffi::AnyBuffer x, Operands operands, Results results) {
  return call(kName<kPass>, kPass, pool, first_class, class_axes, operand_names,
              result_names, x, operands, results);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<int64_t>("first_class")
      .Attr<int64_t>("class_axes")
      .Attr<std::string_view>("operands")
      .Attr<std::string_view>("results")
      .Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_softmax, handle<Pass::kSoftmax>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_log_softmax, handle<Pass::kLogSoftmax>,
                              binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_softmax_pull, handle<Pass::kSoftmaxPull>,
                              binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_log_softmax_pull, handle<Pass::kLogSoftmaxPull>,
                              binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_log_softmax_push, handle<Pass::kLogSoftmaxPush>,
                              binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_to_classes, handle<Pass::kToClasses>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_to_rows, handle<Pass::kToRows>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_summary, handle<Pass::kSummary>, binding());

// The version of XLA's calling convention that this was built for. It is compared with
// that of the running jaxlib before anything is registered.
extern "C" int jaxsoft_ffi_version() {
  return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR;
}

#pragma GCC visibility pop

}  // namespace jaxsoft
