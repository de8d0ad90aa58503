/*
 * A minimal table backend: a hash table of a file, in the dialect of smtpd-tables(7). Reads all waiting requests,
 * answers them with one write, and verifies nothing.
 *
 *   floor KEYS
 */
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct entry {
	const char *key, *value;
	uint32_t key_len, value_len;
};

static struct entry *slots;
static size_t mask;

static struct entry *
find(const char *key, size_t len)
{
	uint64_t h = 14695981039346656037ULL;
	struct entry *e;

	for (size_t i = 0; i < len; i++)
		h = (h ^ (unsigned char)key[i]) * 1099511628211ULL;
	for (h ^= h >> 32;; h++) {
		e = &slots[h & mask];
		if (e->key == NULL || (e->key_len == len && memcmp(e->key, key, len) == 0))
			return e;
	}
}

static void
load(const char *path)
{
	struct stat st;
	char *text, *end, *tab, *eol;
	size_t n = 0, want = 16;
	int fd = open(path, O_RDONLY);

	if (fd < 0 || fstat(fd, &st) < 0 || (text = malloc(st.st_size)) == NULL || read(fd, text, st.st_size) != st.st_size)
		err(1, "%s", path);
	close(fd);
	end = text + st.st_size;
	for (char *p = text; (p = memchr(p, '\n', end - p)) != NULL; p++)
		n++;
	while (want < n * 2)
		want *= 2;
	mask = want - 1;
	if ((slots = calloc(want, sizeof *slots)) == NULL)
		err(1, "calloc");
	for (char *p = text; p < end && (eol = memchr(p, '\n', end - p)) != NULL; p = eol + 1)
		if ((tab = memchr(p, '\t', eol - p)) != NULL)
			*find(p, tab - p) = (struct entry){p, tab + 1, tab - p, eol - tab - 1};
}

static char *
put(char *out, const char *data, size_t len)
{
	memcpy(out, data, len);
	return out + len;
}

static char *
answer(char *out, char *line, size_t len)
{
	char *at[7], *p = line, *end = line + len;
	struct entry *e;

	for (int i = 0; i < 7; i++) {
		if ((p = memchr(p, '|', end - p)) == NULL)
			errx(1, "bad request");
		at[i] = p++;
	}
	e = find(p, end - p);
	out = put(out, at[3] + 1, at[4] - at[3] - 1);
	out = put(out, "-result", 7);
	out = put(out, at[5], at[6] - at[5] + 1);
	if (e->key == NULL)
		return put(out, "not-found\n", 10);
	out = put(out, "found", 5);
	if (at[3][1] == 'l') {
		*out++ = '|';
		out = put(out, e->value, e->value_len);
	}
	*out++ = '\n';
	return out;
}

int
main(int argc, char **argv)
{
	static char in[65536], out[65536 * 8];
	static const char ready[] = "register|alias\nregister|domain\nregister|netaddr\nregister|ready\n";
	size_t len = 0;
	ssize_t n;

	while ((n = read(0, in + len, sizeof in - len)) > 0) {
		char *line = in, *eol, *to = out;

		len += n;
		while ((eol = memchr(line, '\n', in + len - line)) != NULL) {
			if (*line == 't') {
				to = answer(to, line, eol - line);
			} else if (eol - line == 12 && memcmp(line, "config|ready", 12) == 0)
				to = put(to, ready, sizeof ready - 1);
			line = eol + 1;
		}
		if (to > out && write(1, out, to - out) != to - out)
			return 1;
		if (slots == NULL && argc == 2)
			load(argv[1]);
		len -= line - in;
		memmove(in, line, len);
	}
	return 0;
}
