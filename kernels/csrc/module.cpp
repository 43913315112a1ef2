#include <nanobind/nanobind.h>
NB_MODULE(_C, m) { m.attr("__doc__") = "C++ kernels of Gossamer."; }
