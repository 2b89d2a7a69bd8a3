/* Prints the five best classes of a picture: classify NETWORK.dsconv PICTURE.ppm

   cc -std=c11 -O2 classify.c -ldsconv -lm -o classify

   The picture is a binary 8-bit PPM (P6, or P5 for a network with gray images) of the network's size. */
#include <dsconv.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BEST = 5, CHANNELS = 3 };

typedef struct {
  int channels, height, width;
  unsigned char* pixels; /* pixel by pixel */
} picture;

static void fail(const char* what) {
  fprintf(stderr, "classify: %s\n", what);
  exit(EXIT_FAILURE);
}

static void check(dsconv_status status) {
  if (status != DSCONV_OK) fail(dsconv_error());
}

/* Reads a whole number of the header, which a comment may precede. */
static int header_number(FILE* file) {
  int number, next;
  while ((next = fgetc(file)) == '#' || next == ' ' || next == '\t' || next == '\r' || next == '\n') {
    if (next == '#') {
      while (next != '\n' && next != EOF) next = fgetc(file);
    }
  }
  ungetc(next, file);
  if (fscanf(file, "%5d", &number) != 1 || number < 1) fail("the picture is no binary PPM or PGM");
  return number;
}

static picture read_picture(const char* path) {
  FILE* file = fopen(path, "rb");
  if (file == NULL) fail("the picture cannot be opened");
  picture read = {0};
  char kind[3] = "";
  if (fread(kind, 1, 2, file) == 2) read.channels = strcmp(kind, "P6") == 0 ? 3 : strcmp(kind, "P5") == 0 ? 1 : 0;
  if (read.channels == 0) fail("the picture is no binary PPM or PGM");
  read.width = header_number(file);
  read.height = header_number(file);
  if (header_number(file) != 255) fail("the picture has not 8 bits a channel");
  fgetc(file); /* the single blank that ends the header */
  const size_t bytes = (size_t)read.channels * (size_t)read.height * (size_t)read.width;
  read.pixels = malloc(bytes);
  if (read.pixels == NULL) fail("out of memory");
  if (fread(read.pixels, 1, bytes, file) != bytes) fail("the picture ends too soon");
  fclose(file);
  return read;
}

/* Reads the numbers of a setting, at most CHANNELS: the settings are JSON without blanks, such as {"mean":[0.5],"scale":1.0}. */
static int setting(const char* json, const char* name, double numbers[CHANNELS]) {
  char key[32];
  snprintf(key, sizeof key, "\"%s\":", name);
  const char* at = json == NULL ? NULL : strstr(json, key);
  if (at == NULL) return 0;
  at += strlen(key);
  int count = 0;
  for (char* end; count < CHANNELS; ++count, at = end) {
    if (*at == '[' || *at == ',') ++at;
    numbers[count] = strtod(at, &end);
    if (end == at) break;
    if (*end != ',' && *end != ']') return count + 1;
  }
  return count;
}

/* Computes the network's input: (value / (255 / scale) - mean) / std, channel by channel. */
static float* prepared(const picture* image, const char* json) {
  double scale[CHANNELS] = {1}, mean[CHANNELS] = {0}, std[CHANNELS] = {1};
  setting(json, "scale", scale);
  const int means = setting(json, "mean", mean), stds = setting(json, "std", std);
  const bool reversed = json != NULL && strstr(json, "\"channels\":\"bgr\"") != NULL;
  const size_t area = (size_t)image->height * (size_t)image->width;
  const size_t channels = (size_t)image->channels;
  float* values = malloc(area * channels * sizeof *values);
  if (values == NULL) fail("out of memory");
  const float white = (float)(255 / scale[0]);
  for (size_t c = 0; c < channels; ++c) {
    const float m = (float)mean[means > 1 ? c : 0], s = (float)std[stds > 1 ? c : 0];
    const unsigned char* from = image->pixels + (reversed ? channels - 1 - c : c);
    for (size_t i = 0; i < area; ++i) values[c * area + i] = ((float)from[i * channels] / white - m) / s;
  }
  return values;
}

static void print_best(const dsconv_network* network, const float* logits, size_t count) {
  double sum = 0, highest = -INFINITY;
  for (size_t i = 0; i < count; ++i) highest = fmax(highest, logits[i]);
  for (size_t i = 0; i < count; ++i) sum += exp(logits[i] - highest);
  bool* printed = calloc(count, sizeof *printed);
  if (printed == NULL) fail("out of memory");
  for (size_t rank = 0; rank < BEST && rank < count; ++rank) {
    size_t best = count;
    for (size_t i = 0; i < count; ++i) {
      if (!printed[i] && (best == count || logits[i] > logits[best])) best = i;
    }
    printed[best] = true;
    const char* name = dsconv_class_name(network, best);
    printf("%5.1f %%  %zu  %s\n", 100 * exp(logits[best] - highest) / sum, best, name == NULL ? "" : name);
  }
  free(printed);
}

int main(int argc, char** argv) {
  if (argc != 3) fail("expected two arguments: NETWORK.dsconv PICTURE.ppm");
  dsconv_network* network;
  check(dsconv_open(argv[1], &network));
  if (dsconv_input_count(network) != 1 || dsconv_output_count(network) != 1) fail("the network is no classifier of images");

  picture image = read_picture(argv[2]);
  float* values = prepared(&image, dsconv_preprocess(network));
  dsconv_tensor input = {.data = values,
                         .bytes = sizeof(float) * (size_t)image.channels * (size_t)image.height * (size_t)image.width,
                         .type = DSCONV_FLOAT32,
                         .rank = 4,
                         .shape = {1, image.channels, image.height, image.width}};
  dsconv_tensor output = {0};
  check(dsconv_run(network, &input, 1, &output, 1)); /* without memory, this returns the shape of the output */
  if (output.rank != 2) fail("the network is no classifier of images");
  const size_t classes = (size_t)output.shape[1];
  output.bytes = classes * sizeof(float);
  output.data = malloc(output.bytes);
  if (output.data == NULL) fail("out of memory");
  check(dsconv_run(network, &input, 1, &output, 1));
  print_best(network, output.data, classes);

  free(output.data);
  free(values);
  free(image.pixels);
  dsconv_close(network);
  return EXIT_SUCCESS;
}
