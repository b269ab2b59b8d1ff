/*
 * What every call answers to good and to bad arguments.
 *
 *     calls VECTORS PACKED FOLDER
 *
 * VECTORS is the folder of the format's test vectors, PACKED a packed language model with its config.json, and FOLDER one
 * to write into.
 */
#include <bkpack.h>

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                \
    do {                                                                                                \
        if (!(condition)) {                                                                             \
            fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #condition, \
                    bkpack_last_error());                                                               \
            exit(1);                                                                                    \
        }                                                                                               \
    } while (0)

/* The call fails with this status and a sentence that holds this text. */
#define FAILS(call, status, text)                       \
    do {                                                \
        CHECK((call) == (status));                      \
        CHECK(strstr(bkpack_last_error(), text) != 0);  \
    } while (0)

#define OK(call) CHECK((call) == BKPACK_STATUS_OK)
#define REFUSES(call, text) FAILS(call, BKPACK_STATUS_ARGUMENT, text)

static char *path_in(const char *folder, const char *name)
{
    char *path = malloc(strlen(folder) + strlen(name) + 2);
    CHECK(path);
    sprintf(path, "%s/%s", folder, name);
    return path;
}

static bkpack_model *open_vector(const char *vectors, const char *name)
{
    char *path = path_in(vectors, name);
    bkpack_model *model;
    OK(bkpack_open(path, &model));
    CHECK(model);
    free(path);
    return model;
}

static size_t find(const bkpack_model *model, const char *name)
{
    size_t tensor;
    OK(bkpack_tensor_find(model, name, &tensor));
    return tensor;
}

static void test_opening(const char *vectors, const char *folder)
{
    bkpack_model *model = (bkpack_model *)&model;
    REFUSES(bkpack_open(NULL, &model), "file is NULL");
    CHECK(model == NULL);
    REFUSES(bkpack_open(vectors, NULL), "model is NULL");
    char *absent = path_in(folder, "absent.bkpack");
    FAILS(bkpack_open(absent, &model), BKPACK_STATUS_SYSTEM, absent);
    FAILS(bkpack_open("", &model), BKPACK_STATUS_SYSTEM, "");
    FAILS(bkpack_open("\xff\xfe", &model), BKPACK_STATUS_SYSTEM, "");
    FAILS(bkpack_open(folder, &model), BKPACK_STATUS_MODEL, "is a folder");
    free(absent);
    OK(bkpack_close(NULL));

    /* Every malformed file is refused, when it is opened or when it is verified. */
    char *malformed = path_in(vectors, "malformed");
    DIR *files = opendir(malformed);
    CHECK(files);
    size_t refused = 0;
    for (struct dirent *file; (file = readdir(files));) {
        if (!strstr(file->d_name, ".bkpack"))
            continue;
        char *path = path_in(malformed, file->d_name);
        model = (bkpack_model *)&model;
        bkpack_status status = bkpack_open(path, &model);
        CHECK((status == BKPACK_STATUS_OK) == (model != NULL));
        if (status == BKPACK_STATUS_OK)
            status = bkpack_verify(model);
        CHECK(status == BKPACK_STATUS_MODEL || status == BKPACK_STATUS_SYSTEM);
        CHECK(*bkpack_last_error());
        OK(bkpack_close(model));
        free(path);
        refused++;
    }
    closedir(files);
    free(malformed);
    CHECK(refused > 50);
}

/* One changed byte of a weight is found by its hash. */
static void test_damage(const char *vectors, const char *folder)
{
    char *whole = path_in(vectors, "valid/float.bkpack"), *damaged = path_in(folder, "damaged.bkpack");
    FILE *from = fopen(whole, "rb"), *to = fopen(damaged, "wb");
    CHECK(from && to);
    int byte, next = fgetc(from);
    while ((byte = next) != EOF) {
        next = fgetc(from);
        fputc(next == EOF ? byte ^ 1 : byte, to);
    }
    CHECK(fclose(from) == 0 && fclose(to) == 0);
    bkpack_model *model;
    OK(bkpack_open(whole, &model));
    OK(bkpack_verify(model));
    OK(bkpack_close(model));
    OK(bkpack_open(damaged, &model));
    FAILS(bkpack_verify(model), BKPACK_STATUS_MODEL, "does not match its BLAKE3 hash");
    OK(bkpack_close(model));
    free(whole);
    free(damaged);
}

/* No call takes NULL for the model, or for where its result goes. */
static void test_null(const bkpack_model *model)
{
    const char *text;
    const void *data;
    const size_t *dims;
    size_t n;
    bkpack_encoding encoding;
    bkpack_part part;
    float x[128], y[128];
    const char *none = "model is NULL";
    REFUSES(bkpack_verify(NULL), none);
    REFUSES(bkpack_config(NULL, &text), none);
    REFUSES(bkpack_manifest(NULL, &text), none);
    REFUSES(bkpack_file_count(NULL, &n), none);
    REFUSES(bkpack_file_find(NULL, "config.json", &n), none);
    REFUSES(bkpack_file(NULL, 0, &text, &data, &n), none);
    REFUSES(bkpack_tensor_count(NULL, &n), none);
    REFUSES(bkpack_tensor_find(NULL, "w", &n), none);
    REFUSES(bkpack_tensor_name(NULL, 0, &text), none);
    REFUSES(bkpack_tensor_shape(NULL, 0, &dims, &n), none);
    REFUSES(bkpack_tensor_matrix(NULL, 0, &n, &n), none);
    REFUSES(bkpack_tensor_encoding(NULL, 0, &encoding, sizeof encoding), none);
    REFUSES(bkpack_tensor_encoding_text(NULL, 0, &text), none);
    REFUSES(bkpack_tensor_part_count(NULL, 0, &n), none);
    REFUSES(bkpack_tensor_part(NULL, 0, 0, &part, sizeof part), none);
    REFUSES(bkpack_dequantize(NULL, 0, 0, 1, y, 128), none);
    REFUSES(bkpack_matvec(NULL, 0, x, 128, y, 128, 1), none);

    size_t w = find(model, "w"), columns, rows;
    OK(bkpack_tensor_matrix(model, w, &rows, &columns));
    REFUSES(bkpack_config(model, NULL), "json is NULL");
    REFUSES(bkpack_manifest(model, NULL), "json is NULL");
    REFUSES(bkpack_file_count(model, NULL), "count is NULL");
    REFUSES(bkpack_file_find(model, "config.json", NULL), "index is NULL");
    REFUSES(bkpack_file_find(model, NULL, &n), "name is NULL");
    REFUSES(bkpack_file(model, 0, NULL, &data, &n), "name is NULL");
    REFUSES(bkpack_file(model, 0, &text, NULL, &n), "data is NULL");
    REFUSES(bkpack_file(model, 0, &text, &data, NULL), "length is NULL");
    REFUSES(bkpack_tensor_count(model, NULL), "count is NULL");
    REFUSES(bkpack_tensor_find(model, "w", NULL), "tensor is NULL");
    REFUSES(bkpack_tensor_find(model, NULL, &n), "name is NULL");
    REFUSES(bkpack_tensor_name(model, w, NULL), "name is NULL");
    REFUSES(bkpack_tensor_shape(model, w, NULL, &n), "dims is NULL");
    REFUSES(bkpack_tensor_shape(model, w, &dims, NULL), "count is NULL");
    REFUSES(bkpack_tensor_matrix(model, w, NULL, &n), "rows is NULL");
    REFUSES(bkpack_tensor_matrix(model, w, &n, NULL), "columns is NULL");
    REFUSES(bkpack_tensor_encoding(model, w, NULL, sizeof encoding), "encoding is NULL");
    REFUSES(bkpack_tensor_encoding_text(model, w, NULL), "encoding is NULL");
    REFUSES(bkpack_tensor_part_count(model, w, NULL), "count is NULL");
    REFUSES(bkpack_tensor_part(model, w, 0, NULL, sizeof part), "part is NULL");
    REFUSES(bkpack_dequantize(model, w, 0, 1, NULL, 128), "values is NULL");
    REFUSES(bkpack_matvec(model, w, NULL, columns, y, rows, 1), "x is NULL");
    REFUSES(bkpack_matvec(model, w, x, columns, NULL, rows, 1), "y is NULL");
}

/* Tensors, parts and files are counted from 0, and asked for by index or name. */
static void test_indices(const bkpack_model *model)
{
    const char *text;
    const void *data;
    const size_t *dims;
    size_t count, files, parts, n;
    bkpack_encoding encoding;
    bkpack_part part;
    float x[128], y[128];
    OK(bkpack_tensor_count(model, &count));
    OK(bkpack_file_count(model, &files));
    CHECK(count == 2 && files == 4);
    for (size_t tensor = 0; tensor < count; tensor++) {
        OK(bkpack_tensor_name(model, tensor, &text));
        CHECK(find(model, text) == tensor);
    }
    size_t past[] = {count, count + 1, (size_t)-1};
    for (size_t i = 0; i < 3; i++) {
        REFUSES(bkpack_tensor_name(model, past[i], &text), "there are 2");
        REFUSES(bkpack_tensor_shape(model, past[i], &dims, &n), "there are 2");
        REFUSES(bkpack_tensor_matrix(model, past[i], &n, &n), "there are 2");
        REFUSES(bkpack_tensor_encoding(model, past[i], &encoding, sizeof encoding), "there are 2");
        REFUSES(bkpack_tensor_encoding_text(model, past[i], &text), "there are 2");
        REFUSES(bkpack_tensor_part_count(model, past[i], &n), "there are 2");
        REFUSES(bkpack_tensor_part(model, past[i], 0, &part, sizeof part), "there are 2");
        REFUSES(bkpack_dequantize(model, past[i], 0, 1, y, 128), "there are 2");
        REFUSES(bkpack_matvec(model, past[i], x, 128, y, 128, 1), "there are 2");
    }
    OK(bkpack_tensor_part_count(model, 0, &parts));
    REFUSES(bkpack_tensor_part(model, 0, parts, &part, sizeof part), "part");
    REFUSES(bkpack_tensor_part(model, 0, (size_t)-1, &part, sizeof part), "part");
    REFUSES(bkpack_file(model, files, &text, &data, &n), "there are 4");
    FAILS(bkpack_tensor_find(model, "nowhere", &n), BKPACK_STATUS_NOT_FOUND, "no tensor is named nowhere");
    FAILS(bkpack_file_find(model, "nowhere", &n), BKPACK_STATUS_NOT_FOUND, "no file is named nowhere");
    REFUSES(bkpack_tensor_find(model, "\xff", &n), "name is not UTF-8");
    REFUSES(bkpack_file_find(model, "\xff", &n), "name is not UTF-8");

    OK(bkpack_file_find(model, "config.json", &n));
    OK(bkpack_file(model, n, &text, &data, &n));
    CHECK(strcmp(text, "config.json") == 0 && n > 2 && *(const char *)data == '{');
    OK(bkpack_file_find(model, "empty.txt", &n));
    OK(bkpack_file(model, n, &text, &data, &n));
    CHECK(n == 0);
    OK(bkpack_manifest(model, &text));
    CHECK(strstr(text, "\"version\":1") && strstr(text, "\"producer\":") && !strstr(text, "\"tensors\""));
}

/* A structure is filled as far as both sides know it. */
static void test_structures(const bkpack_model *model)
{
    size_t w = find(model, "w");
    struct {
        bkpack_encoding known;
        unsigned char later[24];
    } encoding;
    memset(&encoding, 0xaa, sizeof encoding);
    REFUSES(bkpack_tensor_encoding(model, w, &encoding.known, sizeof encoding.known - 1), "bytes");
    REFUSES(bkpack_tensor_encoding(model, w, &encoding.known, 0), "bytes");
    CHECK(encoding.known.bits == 0xaaaaaaaa);
    OK(bkpack_tensor_encoding(model, w, &encoding.known, sizeof encoding - 8));
    CHECK(encoding.known.kind == BKPACK_KIND_INT && encoding.known.bits == 4 && encoding.known.symmetric == 1);
    CHECK(encoding.known.group_size == 32 && encoding.known.dtype == BKPACK_DTYPE_F16);
    for (size_t i = 0; i < sizeof encoding.later; i++)
        CHECK(encoding.later[i] == (i < 16 ? 0 : 0xaa));
    bkpack_part part;
    REFUSES(bkpack_tensor_part(model, w, 0, &part, sizeof part - 1), "bytes");
}

/* Weights put together from the parts, as the format says, are those that bkpack_dequantize() gives. */
static void test_parts(const char *vectors)
{
    bkpack_model *model = open_vector(vectors, "valid/int4-asymmetric.bkpack");
    size_t w = find(model, "w.33_by_32"), count, rows, columns;
    const size_t *dims;
    OK(bkpack_tensor_shape(model, w, &dims, &count));
    CHECK(count == 2 && dims[0] == 3 && dims[1] == 33);
    OK(bkpack_tensor_matrix(model, w, &rows, &columns));
    CHECK(rows == 3 && columns == 33);
    const char *text;
    OK(bkpack_tensor_encoding_text(model, w, &text));
    CHECK(strcmp(text, "INT4 asym g32 f32 scales") == 0);
    bkpack_part parts[3];
    OK(bkpack_tensor_part_count(model, w, &count));
    CHECK(count == 3);
    for (size_t i = 0; i < 3; i++)
        OK(bkpack_tensor_part(model, w, i, &parts[i], sizeof parts[i]));
    CHECK(parts[0].role == BKPACK_ROLE_PACKED && parts[0].dtype == BKPACK_DTYPE_U32 && parts[0].length == 3 * 5 * 4);
    CHECK(parts[1].role == BKPACK_ROLE_SCALE && parts[1].dtype == BKPACK_DTYPE_F32 && parts[1].length == 3 * 2 * 4);
    CHECK(parts[2].role == BKPACK_ROLE_ZERO_POINT && parts[2].dtype == BKPACK_DTYPE_U32 && parts[2].length == 3 * 4);
    CHECK(strcmp(parts[0].name, "w.33_by_32_packed") == 0 && strcmp(parts[1].name, "w.33_by_32_scale") == 0);
    CHECK(strcmp(parts[2].name, "w.33_by_32_zero_point") == 0);
    const uint32_t *codes = parts[0].data, *zeros = parts[2].data;
    const float *scales = parts[1].data;
    float values[3 * 33];
    OK(bkpack_dequantize(model, w, 0, 3, values, 3 * 33));
    for (size_t i = 0; i < 3; i++) {
        for (size_t j = 0; j < 33; j++) {
            uint32_t code = codes[5 * i + j / 8] >> (4 * (j % 8)) & 15, zero = zeros[i] >> (4 * (j / 32)) & 15;
            CHECK(values[33 * i + j] == (float)((int)code - (int)zero) * scales[2 * i + j / 32]);
        }
    }
    FAILS(bkpack_config(model, &text), BKPACK_STATUS_NOT_FOUND, "carries no config");
    OK(bkpack_close(model));

    /* A scalar has no dimension, and is a matrix of one row and one column. */
    model = open_vector(vectors, "valid/float.bkpack");
    size_t scalar = find(model, "F32.0d");
    OK(bkpack_tensor_shape(model, scalar, &dims, &count));
    CHECK(dims == NULL && count == 0);
    OK(bkpack_tensor_matrix(model, scalar, &rows, &columns));
    CHECK(rows == 1 && columns == 1);
    OK(bkpack_tensor_part(model, scalar, 0, &parts[0], sizeof parts[0]));
    CHECK(parts[0].role == BKPACK_ROLE_VALUES && parts[0].dtype == BKPACK_DTYPE_F32 && parts[0].length == 4);
    OK(bkpack_dequantize(model, scalar, 0, 1, values, 1));
    CHECK(values[0] == *(const float *)parts[0].data);
    OK(bkpack_close(model));

    /* A sharded model is opened by its index. */
    model = open_vector(vectors, "valid/sharded/model.bkpack.index.json");
    OK(bkpack_verify(model));
    OK(bkpack_tensor_count(model, &count));
    CHECK(count > 1);
    OK(bkpack_close(model));
}

/* The config, which is text, and the file that it was read from, which is bytes. */
static void test_config(const char *packed)
{
    bkpack_model *model;
    OK(bkpack_open(packed, &model));
    const char *text, *again, *name;
    OK(bkpack_config(model, &text));
    OK(bkpack_config(model, &again));
    CHECK(text == again && *text == '{' && text[strlen(text) - 1] == '}');
    CHECK(strstr(text, "\"architectures\":[\"LlamaForCausalLM\"]"));
    const void *data;
    size_t file, length;
    OK(bkpack_file_find(model, "config.json", &file));
    OK(bkpack_file(model, file, &name, &data, &length));
    CHECK(length > strlen(text) && memcmp(data, "{\n", 2) == 0);
    OK(bkpack_close(model));
}

/* Ranges and buffers: what does not fit is refused before anything is written. */
static void test_buffers(const bkpack_model *model)
{
    size_t w = find(model, "w"), rows, columns;
    OK(bkpack_tensor_matrix(model, w, &rows, &columns));
    CHECK(rows == 4 && columns == 40);
    /* On the heap and just as long as said, so that a checker of memory sees what lies outside. */
    float *y = malloc(160 * sizeof *y), *x = malloc(40 * sizeof *x);
    CHECK(x && y);
    for (size_t i = 0; i < 160; i++)
        y[i] = -1.0f;
    for (size_t i = 0; i < 40; i++)
        x[i] = 0.25f * (float)i - 3.0f;
    REFUSES(bkpack_dequantize(model, w, 0, 4, y, 159), "values is 159 values long where 160 are needed");
    REFUSES(bkpack_dequantize(model, w, 0, 5, y, 160), "past the tensor, which has 4 rows");
    REFUSES(bkpack_dequantize(model, w, 4, 1, y, 160), "past the tensor");
    REFUSES(bkpack_dequantize(model, w, (size_t)-1, 2, y, 160), "past the tensor");
    REFUSES(bkpack_dequantize(model, w, 1, (size_t)-1, y, 160), "past the tensor");
    REFUSES(bkpack_dequantize(model, w, 0, 1, (float *)((char *)y + 1), 100), "values is not aligned");
    OK(bkpack_dequantize(model, w, 4, 0, y, 0));
    REFUSES(bkpack_matvec(model, w, x, 39, y, 4, 1), "x is 39 values long where 40 are needed");
    REFUSES(bkpack_matvec(model, w, y, 41, x, 4, 1), "x is 41 values long where 40 are needed");
    REFUSES(bkpack_matvec(model, w, x, 40, y, 3, 1), "y is 3 values long where 4 are needed");
    REFUSES(bkpack_matvec(model, w, x, 40, x + 38, 4, 1), "overlap");
    REFUSES(bkpack_matvec(model, w, x, 40, x, 40, 1), "overlap");
    REFUSES(bkpack_matvec(model, w, x, 40, y, 4, 1025), "1025 threads");
    REFUSES(bkpack_matvec(model, w, (float *)((char *)x + 2), 40, y, 4, 1), "x is not aligned");
    for (size_t i = 0; i < 160; i++)
        CHECK(y[i] == -1.0f);

    float first[4];
    OK(bkpack_matvec(model, w, x, 40, first, 4, 1));
    for (size_t threads = 0; threads < 5; threads++) {
        OK(bkpack_matvec(model, w, x, 40, y, 4, threads));
        CHECK(memcmp(first, y, sizeof first) == 0);
    }
    CHECK(y[4] == -1.0f);
    OK(bkpack_dequantize(model, w, 2, 1, y, 40));
    CHECK(y[40] == -1.0f);
    OK(bkpack_dequantize(model, w, 0, 4, y, 160));
    for (size_t i = 0; i < 4; i++) {
        double dot = 0.0;
        for (size_t j = 0; j < 40; j++)
            dot += (double)y[40 * i + j] * (double)x[j];
        CHECK(dot - first[i] < 1e-4 && first[i] - dot < 1e-4);
    }
    free(x);
    free(y);
}

struct task {
    const bkpack_model *model;
    size_t w, threads;
    float expected[4];
};

static void *work(void *argument)
{
    const struct task *task = argument;
    CHECK(*bkpack_last_error() == 0);
    size_t n;
    FAILS(bkpack_tensor_find(task->model, "of this thread", &n), BKPACK_STATUS_NOT_FOUND, "of this thread");
    float x[40], y[160];
    for (size_t i = 0; i < 40; i++)
        x[i] = (float)i;
    for (int i = 0; i < 200; i++) {
        OK(bkpack_matvec(task->model, task->w, x, 40, y, 4, task->threads));
        CHECK(memcmp(task->expected, y, sizeof task->expected) == 0);
        OK(bkpack_dequantize(task->model, task->w, 0, 4, y, 160));
    }
    CHECK(strstr(bkpack_last_error(), "of this thread"));
    return NULL;
}

/* One model on eight threads, each with errors of its own. */
static void test_threads(const bkpack_model *model)
{
    struct task tasks[8] = {{model, find(model, "w"), 0, {0.0f, 0.0f, 0.0f, 0.0f}}};
    float x[40];
    for (size_t i = 0; i < 40; i++)
        x[i] = (float)i;
    OK(bkpack_matvec(model, tasks[0].w, x, 40, tasks[0].expected, 4, 1));
    size_t n;
    FAILS(bkpack_tensor_find(model, "of the first", &n), BKPACK_STATUS_NOT_FOUND, "of the first");
    pthread_t threads[8];
    for (size_t i = 0; i < 8; i++) {
        tasks[i] = tasks[0];
        tasks[i].threads = i % 4;
        CHECK(pthread_create(&threads[i], NULL, work, &tasks[i]) == 0);
    }
    for (size_t i = 0; i < 8; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(strstr(bkpack_last_error(), "of the first"));
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: calls VECTORS PACKED FOLDER\n");
        return 2;
    }
    CHECK(*bkpack_version() && *bkpack_last_error() == 0);
    test_opening(argv[1], argv[3]);
    test_damage(argv[1], argv[3]);
    test_parts(argv[1]);
    test_config(argv[2]);
    bkpack_model *model = open_vector(argv[1], "valid/files.bkpack");
    test_null(model);
    test_indices(model);
    test_structures(model);
    test_buffers(model);
    test_threads(model);
    OK(bkpack_close(model));
    printf("all calls answer as they should\n");
    return 0;
}
