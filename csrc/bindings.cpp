// The only file that knows Python: everything else under csrc/ is plain C++20.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "isa.h"

NB_MODULE(_C, m) {
  m.doc() = "Compiled part of dsconv";
  m.def("isa_found", &dsconv::isa_found,
        "Instruction sets that this processor has and the operating system lets this process use, weakest first.");
}
