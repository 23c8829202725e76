/* llama.cpp without Python, as benchmarks/memory.py runs it. Two more arguments: LOAD_MODE (0 no mapping, 1 mapping) and
 * REPACK (0 or 1). The header and the library are llama.cpp's own, of the version that llama-cpp-python builds. */
#include "llama.h"
#include "timing.h"

typedef struct {
  struct llama_context* context;
  int vocab_size;
} State;

static void say_nothing(enum ggml_log_level level, const char* text, void* data) {
  (void)level, (void)text, (void)data;
}

static int32_t decode(State* state, const int32_t* ids, int count) {
  llama_token tokens[1024];
  for (int i = 0; i < count; ++i) tokens[i] = ids[i];
  if (llama_decode(state->context, llama_batch_get_one(tokens, count))) return failed("llama_decode failed"), -1;
  const float* logits = llama_get_logits_ith(state->context, -1);
  int32_t best = 0;
  for (int32_t id = 1; id < state->vocab_size; ++id)
    if (logits[id] > logits[best]) best = id;
  return best;
}

static int32_t read_prompt(void* given, const int32_t* ids, int count) {
  State* state = given;
  llama_memory_clear(llama_get_memory(state->context), true);
  return decode(state, ids, count);
}

static int32_t step(void* given, int32_t id) { return decode(given, &id, 1); }

int main(int argc, char** argv) {
  const double begin = now();
  Spec spec;
  if (read_spec(argc, argv, &spec)) return 2;
  if (argc != 11) return failed("expected LOAD_MODE and REPACK"), 2;
  llama_log_set(say_nothing, NULL);
  llama_backend_init();
  struct llama_model_params params = llama_model_default_params();
  params.load_mode = (enum llama_load_mode)atoi(argv[9]);
  params.use_extra_bufts = atoi(argv[10]) != 0;
  struct llama_model* model = llama_model_load_from_file(spec.path, params);
  if (!model) return failed("the model cannot be loaded");
  struct llama_context_params sizes = llama_context_default_params();
  sizes.n_ctx = 512, sizes.n_batch = sizes.n_ubatch = 256;
  sizes.n_threads = sizes.n_threads_batch = spec.threads;
  State state = {llama_init_from_model(model, sizes), llama_vocab_n_tokens(llama_model_get_vocab(model))};
  if (!state.context) return failed("no context");
  const Contender contender = {&state, read_prompt, step};
  return time_it(&contender, &spec, begin, now());
}
