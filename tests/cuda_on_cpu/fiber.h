// One fiber per CUDA thread. A switch saves six registers; swapcontext would make a system call for the signal mask.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__)

struct Context {
  void* stack_pointer = nullptr;
};

// Pushes what a call must preserve, exchanges the stacks, pops it and returns on the other one.
asm(R"(
.text
.p2align 4
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
extern "C" void emulator_switch(Context* from, Context* to);

inline void switch_context(Context& from, Context& to) { emulator_switch(&from, &to); }

inline void make_context(Context& context, unsigned char* stack, unsigned long bytes, void (*entry)()) {
  // On entry to a function the stack is 8 bytes off a multiple of 16: the return address has just been pushed.
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;
  *top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 6;
}

#else

struct Context {
  ucontext_t context;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

inline void make_context(Context& context, unsigned char* stack, unsigned long bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

#endif

}  // namespace emulator
