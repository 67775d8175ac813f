#include "fibers.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace host_cuda {

// The System V ABI of each architecture.
#if defined(__x86_64__)
asm(R"(
.text
.globl switch_stack
.type switch_stack, @function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stack, .-switch_stack
)");
constexpr size_t kSavedRegisters = 6;
constexpr size_t kReturnSlot = 6;  // above them: the address that `ret` takes
#elif defined(__aarch64__)
asm(R"(
.text
.globl switch_stack
.type switch_stack, %function
switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp d8, d9, [sp, #80]
  stp d10, d11, [sp, #96]
  stp d12, d13, [sp, #112]
  stp d14, d15, [sp, #128]
  stp x29, x30, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp d8, d9, [sp, #80]
  ldp d10, d11, [sp, #96]
  ldp d12, d13, [sp, #112]
  ldp d14, d15, [sp, #128]
  ldp x29, x30, [sp, #144]
  add sp, sp, #160
  ret
.size switch_stack, .-switch_stack
)");
constexpr size_t kSavedRegisters = 20;
constexpr size_t kReturnSlot = 19;  // x30
#else
  #error "host_cuda: the context switch is written for x86-64 and aarch64"
#endif

void* fresh_stack(void* top, void (*entry)()) {
  auto* frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63}) - 1;
  *frame = nullptr;  // a return address for unwinders
#if defined(__x86_64__)
  frame -= kReturnSlot + 1;
#else
  frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(frame) & ~uintptr_t{15}) - kSavedRegisters;
#endif
  std::fill(frame, frame + kSavedRegisters, nullptr);
  frame[kReturnSlot] = reinterpret_cast<void*>(entry);
  return frame;
}

}  // namespace host_cuda
