// The module fused_resnet._C: the launch planner of the CUDA kernels, which needs no CUDA, and the list of
// CPU implementation operators. Each operator is implemented and registered in the file named beside it.
#include <torch/csrc/stable/library.h>

#include <string>

#include "bindings_planner.h"  // Python's header comes before any other
#include "cpu/isa.h"

STABLE_TORCH_LIBRARY(fused_resnet_C, m) {
  // cpu/epilogue.cpp: y = act(scale * y + shift + residual) in place
  m.def(
      "scale_shift_add_act_(Tensor(a!) y, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? "
      "running_mean, "
      "Tensor? running_var, float eps, Tensor? residual, int activation) -> ()");
  // cpu/conv_ops.cpp: NHWC, float32 or bfloat16; weights to pack are float32. m and weights: see
  // cpu/kernel_choice.h
  m.def("conv_pack(Tensor weight, int m, str isa, str weights='whole') -> Tensor");
  m.def(
      "conv_fused(Tensor x, Tensor packed, int[] filter, int m, str isa, int[] stride, int[] padding, "
      "int[] dilation, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, Tensor? "
      "running_var, "
      "float eps, Tensor? residual, int activation, str weights='whole') -> Tensor");
  m.def(
      "conv_max_pool(Tensor x, Tensor packed, int[] filter, str isa, int[] stride, int[] padding, int[] "
      "dilation, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, Tensor? "
      "running_var, float eps, int activation, int[] pool, str weights='whole') -> Tensor");
  // cpu/training_conv.cpp: 3 x 3, stride 1. The input's gradient is conv_fused of grad_y with these weights
  m.def("conv_pack_input_gradient(Tensor weight, int m, str isa, str weights='whole') -> Tensor");
  m.def("conv_weight_gradient(Tensor x, Tensor grad_y, int[] padding, int m, str isa) -> Tensor");
  // cpu/weight_checksum.cpp: one row for each tensor; equal rows mean equal sizes, strides and bytes
  m.def("checksum(Tensor[] tensors) -> Tensor");
  // cpu/conv_program.cpp: several convolutions; nothing is returned where a checked weight has changed
  m.def("conv_program(Tensor[] inputs, Tensor[] tensors, Tensor program, bool checked) -> Tensor[]");
  // cpu/training.cpp: the four passes of a training tail; outputs come allocated
  m.def("cpu_bn_stats(Tensor y, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "cpu_bn_apply(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? proj_y, Tensor? proj_mean, Tensor? proj_invstd, Tensor? proj_weight, Tensor? proj_bias, "
      "float lower, float upper, Tensor(a!) out, Tensor(b!)? mask) -> ()");
  m.def(
      "cpu_bn_backward_reduce(Tensor grad_out, Tensor? mask, Tensor y, Tensor mean, Tensor invstd, "
      "Tensor? proj_y, Tensor? proj_mean, Tensor? proj_invstd, Tensor(a!) sum_dz, Tensor(b!) sum_dz_xhat, "
      "Tensor(c!)? proj_sum_dz_xhat) -> ()");
  m.def(
      "cpu_bn_backward_apply(Tensor grad_out, Tensor? mask, Tensor y, Tensor mean, Tensor invstd, "
      "Tensor? weight, Tensor mean_dz, Tensor mean_dz_xhat, Tensor? proj_y, Tensor? proj_mean, "
      "Tensor? proj_invstd, Tensor? proj_weight, Tensor? proj_mean_dz, Tensor? proj_mean_dz_xhat, "
      "Tensor(a!) d_y, Tensor(b!)? d_second) -> ()");
  m.def("cpu_training_isa(str isa) -> str");
}

namespace {

using namespace fused_resnet;

PyObject* build_info(PyObject*, PyObject*) {
  return python::answer([] {
    python::Object info = python::dict(), isas(PyList_New(0));
    for (const auto& isa : cpu::isas()) python::append(isas, std::string(isa));
    python::set(info, "compiler", __VERSION__);
    python::set(info, "cpu_isa", std::string(cpu::best_isa()));
    python::set(info, "cpu_isas", std::move(isas));
    return info;
  });
}

PyMethodDef kFunctions[] = {{"build_info", build_info, METH_NOARGS,
                             "The compiler that built the extension, the instruction set that its CPU "
                             "kernels use here, and all those "
                             "that they can be asked for: the ones of this CPU from that one down."},
                            {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels and launch planner of fused_resnet.", -1,
                       kFunctions};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return python::answer([] {
    python::Object module(PyModule_Create(&kModule));
    bind_planner(module.get());
    return module;
  });
}
