#include "guarded.h"

#include <new>
#include <string>

#include "failure.h"
#include "refusals.h"

namespace coreinfer {
namespace {

thread_local std::string last_message;

int fail(int status, const char* message) noexcept {
  try {
    last_message = message;
  } catch (...) {
    last_message.clear();
  }
  return status;
}

}  // namespace

int report_failure() noexcept {
  try {
    throw;
  } catch (const Failure& error) {
    return fail(error.status, error.what());
  } catch (const Unsupported& error) {
    return fail(COREINFER_UNSUPPORTED, error.what());
  } catch (const std::invalid_argument& error) {
    return fail(COREINFER_ARGUMENT, error.what());
  } catch (const PoolFull& error) {
    return fail(COREINFER_NO_ROOM, error.what());
  } catch (const NoAddressSpace& error) {
    return fail(COREINFER_NO_ADDRESS_SPACE, error.what());
  } catch (const Busy& error) {
    return fail(COREINFER_BUSY, error.what());
  } catch (const std::bad_alloc&) {
    return fail(COREINFER_MEMORY, "memory: the system gives no more");
  } catch (const std::exception& error) {
    return fail(COREINFER_INTERNAL, error.what());
  } catch (...) {
    return fail(COREINFER_INTERNAL, "an unknown error");
  }
}

const char* last_failure() noexcept { return last_message.c_str(); }

void check_given(const void* pointer, const char* name) {
  if (!pointer) refuse(name, "a pointer", "NULL");
}

void check_flags(int flags, int known) {
  if (flags & ~known) refuse("flags", "those of the function", std::to_string(flags));
}

}  // namespace coreinfer
