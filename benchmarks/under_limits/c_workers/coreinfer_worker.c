/* The engine without Python, under a limit of memory, as benchmarks/memory.py runs it. One more argument: bytes of KV cache
 * under a limit. */
#include "coreinfer.h"
#include "timing.h"

/* Of what a process takes beside its weights, not yet there when it opens them: buffers of the engine, logits. */
static const double headroom_bytes = 26e6;

typedef struct {
  coreinfer_model* model;
  int cluster;
} State;

static int32_t checked(int status, int32_t next) {
  if (status == COREINFER_OK) return next;
  fprintf(stderr, "error: %s\n", coreinfer_last_error());
  return -1;
}

static int32_t read_prompt(void* given, const int32_t* ids, int count) {
  State* state = given;
  int32_t next = -1;
  int status = coreinfer_truncate(state->model, 0);
  if (!status) status = coreinfer_use(state->model, COREINFER_DENSE);
  if (!status && state->cluster >= 0) status = coreinfer_prepare(state->model, state->cluster);
  if (!status) status = coreinfer_feed_greedy(state->model, ids, (size_t)count, &next);
  if (!status) status = coreinfer_use(state->model, state->cluster);
  return checked(status, next);
}

static int32_t step(void* given, int32_t id) {
  int32_t next = -1;
  const int status = coreinfer_feed_greedy(((State*)given)->model, &id, 1, &next);
  return checked(status, next);
}

int main(int argc, char** argv) {
  const double begin = now();
  Spec spec;
  if (read_spec(argc, argv, &spec)) return 2;
  if (argc != 10) return failed("expected KV_BYTES"), 2;
  coreinfer_options options = {.struct_bytes = sizeof options, .num_threads = spec.threads};
  if (spec.limit_bytes > 0) {
    const double own = 1024 * proc_sum("/proc/self/status", (const char*[]){"RssAnon", "RssFile", NULL});
    const double left = spec.limit_bytes - own - headroom_bytes;
    /* 0 would be no limit. */
    if (left < 1) return failed("the limit is less than the process takes besides");
    options.memory_bytes = (uint64_t)left;
    options.kv_cache_bytes = strtoull(argv[9], NULL, 10);
  }
  State state = {NULL, spec.cluster};
  if (coreinfer_open(spec.path, &options, &state.model)) return failed(coreinfer_last_error());
  const Contender contender = {&state, read_prompt, step};
  const int status = time_it(&contender, &spec, begin, now());
  coreinfer_close(state.model);
  return status;
}
