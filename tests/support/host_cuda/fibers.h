// Stacks to switch between: a dozen instructions, where swapcontext would make two system calls.
#pragma once

namespace host_cuda {

// Saves the callee-saved registers on the running stack, its pointer to *save, and takes up the stack `load`.
extern "C" void switch_stack(void** save, void* load);

// What `load` is for a stack that nothing has run on yet: switching to it calls entry(), which never returns.
void* fresh_stack(void* top, void (*entry)());

}  // namespace host_cuda
