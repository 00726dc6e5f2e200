// What the handlers of XLA calls and the loops over logits have in common.
//
// Arrays are seen as (outer, classes, inner): the class axes as one, the axes before
// and those after them as one each. A row is one pair (outer, inner), counted in this
// order.
#pragma once

#include <cstdint>

namespace jaxsoft {

constexpr int kMaxGroups = 6;
constexpr int kMaxCoefficients = 4;

enum class Number { kFloat, kDouble, kBfloat16, kHalf };

struct Shape {
  int64_t outer = 1;
  int64_t classes = 1;
  int64_t inner = 1;

  int64_t rows() const { return outer * inner; }
};

// An operand that broadcasts to the logits. A stride counts numbers, and is 0 along an
// axis over which the operand is broadcast. The outer axes are in groups, the last of
// them fastest, so that a mask (8, 1, 256) reads in place beside logits (8, 12, 256).
struct Array {
  const void* data = nullptr;  // null: the operand is not given
  Number number = Number::kFloat;
  int64_t class_stride = 0;
  int64_t inner_stride = 0;
  int groups = 0;
  int64_t group_size[kMaxGroups] = {};
  int64_t group_stride[kMaxGroups] = {};

  explicit operator bool() const { return data != nullptr; }

  // Where the row begins.
  int64_t offset(int64_t outer, int64_t inner) const {
    int64_t sum = inner * inner_stride;
    if (groups == 1) return sum + outer * group_stride[0];
    for (int g = groups - 1; g >= 0; --g) {
      sum += outer % group_size[g] * group_stride[g];
      outer /= group_size[g];
    }
    return sum;
  }
};

enum class Pass {
  kSoftmax,
  kLogSoftmax,
  kSoftmaxPull,
  kLogSoftmaxPull,
  kLogSoftmaxPush,
  kToClasses,
  kToRows,
  kSummary,
};

// One call. Sums are of float, or of double for logits of double; that is the dtype of
// every operand and result with a number per row, but for the labels.
struct Job {
  Pass pass = Pass::kSummary;
  Shape shape;
  bool in_double = false;

  Array x;            // logits
  Array where;        // bytes, 0 is a masked class
  Array temperature;  // per row, of either sign
  Array values;       // a cotangent, a tangent or values: one per class
  Array coefficients[kMaxCoefficients];
  int coefficient_count = 0;
  Array labels;    // int32, per row; a number outside [0, classes) is no class
  Array m;         // per row
  Array scale;     // per row
  Array at_label;  // per row
  bool with_e_d = false;

  void* classes_out = nullptr;  // a number for every class
  Number classes_out_number = Number::kFloat;

  // A number for every row; null is not asked for.
  void* m_out = nullptr;
  void* s_out = nullptr;
  void* e_d_out = nullptr;
  void* logit_out = nullptr;
  void* total_out[kMaxCoefficients] = {};
  void* below_out[kMaxCoefficients] = {};
  void* value_out = nullptr;
  void* deviation_out = nullptr;
  void* others_out = nullptr;
  void* to_rows_out = nullptr;
  void* at_label_out = nullptr;
};

// Runs tasks that do not depend on one another, in any order, and waits for them.
class Workers {
 public:
  using Task = void (*)(void* context, int64_t task);

  virtual void run(int64_t tasks, Task task, void* context) = 0;

 protected:
  ~Workers() = default;
};

// rows.cc, compiled for several kinds of processor.
void run_for_any(const Job& job, Workers& workers);
void run_for_avx2(const Job& job, Workers& workers);
void run_for_avx512(const Job& job, Workers& workers);

}  // namespace jaxsoft
