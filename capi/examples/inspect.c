/*
 * Lists the tensors of a packed model, multiplies one of them with a vector and checks the product against dot products of
 * its own, and dequantizes all of them on two threads at once.
 *
 *     cc inspect.c $(pkg-config --cflags --libs bkpack) -pthread -lm -o inspect
 *     ./inspect model.bkpack [TENSOR]
 */
#include <bkpack.h>

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

/* Says what was wrong if a call failed. */
static bool succeeded(bkpack_status status)
{
    if (status != BKPACK_STATUS_OK)
        fprintf(stderr, "inspect: %s\n", bkpack_last_error());
    return status == BKPACK_STATUS_OK;
}

static const char *role_name(bkpack_role role)
{
    switch (role) {
    case BKPACK_ROLE_VALUES: return "values";
    case BKPACK_ROLE_PACKED: return "packed";
    case BKPACK_ROLE_SCALE: return "scale";
    case BKPACK_ROLE_ZERO_POINT: return "zero point";
    default: return "a part of a later version";
    }
}

/* A name comes from the file, so it may hold anything; control characters do not reach the terminal. */
static void print_name(const char *name)
{
    int width = 0;
    for (; *name; name++, width++)
        putchar((unsigned char)*name < ' ' || *name == 127 ? '?' : *name);
    printf("%*s", width < 48 ? 48 - width : 1, "");
}

/* One line for a tensor: name, shape, encoding, and the bytes of each part. */
static bool print_tensor(const bkpack_model *model, size_t tensor)
{
    const char *name, *encoding;
    const size_t *dims;
    size_t dim_count, part_count;
    if (!succeeded(bkpack_tensor_name(model, tensor, &name))
        || !succeeded(bkpack_tensor_encoding_text(model, tensor, &encoding))
        || !succeeded(bkpack_tensor_shape(model, tensor, &dims, &dim_count))
        || !succeeded(bkpack_tensor_part_count(model, tensor, &part_count)))
        return false;
    print_name(name);
    printf("[");
    for (size_t i = 0; i < dim_count; i++)
        printf(i ? ", %zu" : "%zu", dims[i]);
    printf("] %s:", encoding);
    for (size_t i = 0; i < part_count; i++) {
        bkpack_part part;
        if (!succeeded(bkpack_tensor_part(model, tensor, i, &part, sizeof part)))
            return false;
        printf(" %s %zu", role_name(part.role), part.length);
    }
    printf(" bytes\n");
    return true;
}

/* Multiplies a tensor with a vector, on one thread, two, and all, and checks every element against the dot product of the
 * dequantized row in double precision. */
static bool check_product(const bkpack_model *model, size_t tensor)
{
    size_t rows, columns;
    if (!succeeded(bkpack_tensor_matrix(model, tensor, &rows, &columns)))
        return false;
    float *x = malloc(columns * sizeof *x), *row = malloc(columns * sizeof *row), *y = malloc(rows * sizeof *y);
    bool right = x && row && y;
    for (size_t j = 0; right && j < columns; j++)
        x[j] = (float)sin(0.1 * (double)(j + 1));
    double worst = 0.0;
    for (size_t threads = 0; right && threads <= 2; threads++) {
        right = succeeded(bkpack_matvec(model, tensor, x, columns, y, rows, threads));
        for (size_t i = 0; right && i < rows; i++) {
            if (!(right = succeeded(bkpack_dequantize(model, tensor, i, 1, row, columns))))
                break;
            double dot = 0.0, magnitude = 0.0;
            for (size_t j = 0; j < columns; j++) {
                dot += (double)row[j] * (double)x[j];
                magnitude += fabs((double)row[j] * (double)x[j]);
            }
            double error = fabs((double)y[i] - dot);
            if (magnitude > 0.0 && error / magnitude > worst)
                worst = error / magnitude;
            /* Not below the limit, so that NaN is wrong, too. */
            if (!(error <= 1e-5 * magnitude)) {
                fprintf(stderr, "inspect: row %zu gives %.9g where the dot product is %.9g\n", i, (double)y[i], dot);
                right = false;
            }
        }
    }
    if (right)
        printf("W x agrees with %zu dot products of %zu elements: largest error %.1e of the products' magnitude\n",
               rows, columns, worst);
    free(x);
    free(row);
    free(y);
    return right;
}

/* What one thread does: every second tensor, or the others. */
struct share {
    const bkpack_model *model;
    size_t first, step;
    double sum;
    uint64_t values;
    bool right;
};

static void *read_share(void *argument)
{
    struct share *share = argument;
    size_t count;
    share->right = succeeded(bkpack_tensor_count(share->model, &count));
    for (size_t tensor = share->first; share->right && tensor < count; tensor += share->step) {
        size_t rows, columns;
        if (!(share->right = succeeded(bkpack_tensor_matrix(share->model, tensor, &rows, &columns))))
            break;
        float *row = malloc(columns * sizeof *row);
        share->right = row != NULL;
        for (size_t i = 0; share->right && i < rows; i++) {
            share->right = succeeded(bkpack_dequantize(share->model, tensor, i, 1, row, columns));
            for (size_t j = 0; share->right && j < columns; j++)
                share->sum += fabs((double)row[j]);
        }
        share->values += (uint64_t)rows * columns;
        free(row);
    }
    return NULL;
}

/* Reads all weights on two threads that share the model, and once more on one: both find the same. */
static bool check_threads(const bkpack_model *model)
{
    struct share shares[2] = {{model, 0, 2, 0.0, 0, false}, {model, 1, 2, 0.0, 0, false}};
    struct share all = {model, 0, 1, 0.0, 0, false};
    pthread_t threads[2];
    int started = 0;
    while (started < 2 && pthread_create(&threads[started], NULL, read_share, &shares[started]) == 0)
        started++;
    for (int i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    read_share(&all);
    if (started < 2 || !shares[0].right || !shares[1].right || !all.right)
        return false;
    double sum = shares[0].sum + shares[1].sum;
    printf("%" PRIu64 " weights read on two threads: mean magnitude %.6g\n", all.values,
           sum / (double)all.values);
    if (shares[0].values + shares[1].values != all.values || !(fabs(sum - all.sum) <= 1e-9 * all.sum)) {
        fprintf(stderr, "inspect: two threads find a sum of %.17g where one finds %.17g\n", sum, all.sum);
        return false;
    }
    return true;
}

/* The tensor of this name, or without one the first that is a matrix; the first of all if none is. */
static bool choose(const bkpack_model *model, const char *name, size_t *tensor)
{
    size_t count;
    if (name)
        return succeeded(bkpack_tensor_find(model, name, tensor));
    if (!succeeded(bkpack_tensor_count(model, &count)))
        return false;
    for (*tensor = 0; *tensor < count; ++*tensor) {
        size_t rows, columns;
        if (!succeeded(bkpack_tensor_matrix(model, *tensor, &rows, &columns)))
            return false;
        if (rows > 1)
            return true;
    }
    *tensor = 0;
    return true;
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: inspect MODEL [TENSOR]\n");
        return 2;
    }
    bkpack_model *model;
    if (!succeeded(bkpack_open(argv[1], &model)))
        return 2;
    size_t count, tensor;
    bool right = succeeded(bkpack_verify(model)) && succeeded(bkpack_tensor_count(model, &count));
    for (size_t i = 0; right && i < count; i++)
        right = print_tensor(model, i);
    right = right && choose(model, argc > 2 ? argv[2] : NULL, &tensor) && check_product(model, tensor)
        && check_threads(model);
    bkpack_close(model);
    return right ? 0 : 1;
}
