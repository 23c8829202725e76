/* What the C workers of benchmarks/memory.py share: the same steps as python_worker.py, and the same line of JSON. */
#ifndef TIMING_H
#define TIMING_H

#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
  const char* path;
  int cluster, threads; /* cluster: -1 for the dense FFN */
  double limit_bytes;   /* of the whole process; 0 for none */
  int prompt_tokens, warm_tokens, num_tokens;
  double seconds; /* of decoding, at most */
} Spec;

typedef struct {
  void* state;
  /* Forget everything and read a prompt in one call; the likeliest token after it, or -1. */
  int32_t (*read)(void* state, const int32_t* ids, int count);
  int32_t (*step)(void* state, int32_t id);
} Contender;

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Sum of the numbers after these names in a file of /proc. */
static double proc_sum(const char* path, const char* const* names) {
  char line[256];
  double sum = 0;
  FILE* file = fopen(path, "r");
  if (!file) return 0;
  while (fgets(line, sizeof line, file))
    for (const char* const* name = names; *name; ++name)
      if (!strncmp(line, *name, strlen(*name))) sum += atof(strchr(line, ':') + 1);
  fclose(file);
  return sum;
}

/* Bytes that the process has had read from disk. */
static double disk_bytes(void) { return proc_sum("/proc/self/io", (const char*[]){"read_bytes:", NULL}); }

static int failed(const char* message) {
  fprintf(stderr, "error: %s\n", message);
  return 1;
}

/* PATH CLUSTER THREADS LIMIT_BYTES PROMPT_TOKENS WARM_TOKENS NUM_TOKENS SECONDS */
static int read_spec(int argc, char** argv, Spec* spec) {
  if (argc < 9) return failed("expected PATH CLUSTER THREADS LIMIT_BYTES PROMPT_TOKENS WARM_TOKENS NUM_TOKENS SECONDS");
  *spec = (Spec){argv[1],       atoi(argv[2]), atoi(argv[3]), atof(argv[4]),
                 atoi(argv[5]), atoi(argv[6]), atoi(argv[7]), atof(argv[8])};
  return 0;
}

/* First token after a prompt, then decoding until there are enough tokens or no time is left. */
static int time_it(const Contender* contender, const Spec* spec, double begin, double loaded) {
  int32_t ids[1024], next;
  if (spec->prompt_tokens > 1024) return failed("expected at most 1024 tokens of a prompt");
  for (int i = 0; i < spec->prompt_tokens; ++i) ids[i] = 1000 + i;
  next = contender->read(contender->state, ids, spec->prompt_tokens);
  const double first = now();
  /* The first tokens bring in what stays. */
  for (int i = 0; i < spec->warm_tokens && next >= 0; ++i) next = contender->step(contender->state, next);
  int count = 0;
  const double decoding = now(), before = disk_bytes();
  while (next >= 0 && count < spec->num_tokens && (count == 0 || now() - decoding < spec->seconds)) {
    next = contender->step(contender->state, next);
    ++count;
  }
  const double seconds = now() - decoding;
  if (next < 0) return 1;
  printf("{\"decode_tok_s\": %.3f, \"first_token_seconds\": %.3f, \"load_seconds\": %.3f, \"disk_mb_a_token\": %.3f, "
         "\"num_tokens\": %d}\n",
         count / seconds, first - begin, loaded - begin, (disk_bytes() - before) / count / 1e6, count);
  return 0;
}

#endif
