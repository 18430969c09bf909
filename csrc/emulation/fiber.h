// A coroutine's stack, and how to go from one to another.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace gk::emulation {

constexpr size_t kStackBytes = 128 << 10;

#ifdef __x86_64__

// Callee-saved registers go on the stack; ucontext would make two system calls per switch.
asm(".text\n"
    ".type gk_switch_stack, @function\n"
    "gk_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
extern "C" void gk_switch_stack(void** from, void* to);

struct Context {
  void* top = nullptr;
  void start(char* stack, size_t size, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) / 16 * 16) - 8;
    std::fill(frame, frame + 8, nullptr);  // six registers, where to return to, and from there to nowhere
    frame[6] = reinterpret_cast<void*>(entry);
    top = frame;
  }
  void switch_to(const Context& other) { gk_switch_stack(&top, other.top); }
};

#else

struct Context {
  ucontext_t registers;
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&registers);
    registers.uc_stack.ss_sp = stack, registers.uc_stack.ss_size = size, registers.uc_link = nullptr;
    makecontext(&registers, entry, 0);
  }
  void switch_to(const Context& other) { swapcontext(&registers, &other.registers); }
};

#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

// Tells AddressSanitizer which stack is in use.
class StackSwitch {
 public:
#if defined(__SANITIZE_ADDRESS__)
  StackSwitch(const void* bottom, size_t size, bool last) {
    __sanitizer_start_switch_fiber(last ? nullptr : &saved, bottom, size);
  }
  ~StackSwitch() { __sanitizer_finish_switch_fiber(saved, nullptr, nullptr); }
  void* saved = nullptr;
#else
  StackSwitch(const void*, size_t, bool) {}
#endif
};

}  // namespace gk::emulation
