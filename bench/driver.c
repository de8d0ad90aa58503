/*
 * Starts a table backend as smtpd does, sends requests, verifies every answer, and prints one line of JSON.
 *
 *   driver [-p lines|imsg] [-o lookup|check] [-s SERVICE] [-t TABLE] [-d CPU] [-c CPU] [-e FILE] -k KEYS -x STEP...
 *       -- PROGRAM [ARG...]
 *
 * -p selects the dialect: the lines of smtpd 7.6 and later, or imsg(3) of smtpd 6.8 to 7.5. KEYS has lines
 * "key<TAB>value"; a line without a tab is a key that is absent from the table. -d and -c pin the driver and the child
 * to a processor, -e names a file for the child's standard error. Steps, in order:
 *
 *   warm SECONDS          repeat the first key until its answer is right; errors are allowed until then
 *   lookup N              one request outstanding
 *   pipe N W              W requests outstanding, a new one for each answer; not in imsg
 *   soak SECONDS [RATE]   one outstanding, without a pause or RATE a second (due_: counted from the due time)
 *   edited SECONDS RATE HOST PORT PATH   the same, while another process stores a new value in Consul each second
 *   edit HOST PORT PATH N THINK   store a new value of the first key in Consul, repeat the lookup until it is returned;
 *                         N times (2 or more; the last restores the value), each after a random pause of up to THINK ms
 *   sleep SECONDS         send no request
 *   memory                the resident memory of the child, and its peak
 *
 * Latencies are in microseconds. Exit status: 0, 1 for bad arguments, 3 for a wrong answer, 4 for a missing one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_STEPS 32
#define MAX_WINDOW 256
#define MAX_LINE 4096
#define LATE_US 25000
/* A child without an answer for this long has failed. */
#define SILENCE_SECONDS 30
/* More answers per second than any child gives with one request outstanding. */
#define MOST_A_SECOND 300000

/* openbsd-compat/imsg.h, struct imsg_hdr, and smtpd-api.h: the types of messages. */
struct header {
	uint32_t type;
	uint16_t length, flags;
	uint32_t peer, pid;
};
enum { OK = 0, OPEN = 2, CHECK = 5, LOOKUP = 6 };
#define VERSION 2
#define MAX_NAME 2048

struct line {
	char *request, *reply; /* whole lines, complete but for the id; or whole messages, which have none */
	uint32_t request_len, reply_len;
};

static struct line *lines;
static size_t nlines;
static size_t request_id_at, reply_id_at, value_at;
static int imsg;
static int child_fd;
static pid_t child;
static int child_cpu = -1, driver_cpu = -1;
static const char *op = "lookup", *service = "alias", *table = "bench";
static uint64_t seed = 88172645463325252ULL;
static uint32_t next_id;

/* Input from the child that is not yet verified. */
static char in[MAX_LINE * MAX_WINDOW];
static size_t in_len;

static double
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static uint64_t
random64(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static void
silence(int sig)
{
	static const char text[] = "driver: no answer\n";

	(void)sig;
	if (write(2, text, sizeof text - 1) < 0)
		_exit(5);
	_exit(4);
}

static void
put_hex(char *at, uint32_t number)
{
	static const char digits[] = "0123456789abcdef";

	for (int i = 7; i >= 0; i--, number >>= 4)
		at[i] = digits[number & 15];
}

/* In imsg the answer belongs to the only outstanding request. */
static void
put_id(char *at, uint32_t id)
{
	if (!imsg)
		put_hex(at, id);
}

static void
show(const char *what, const char *data, size_t len)
{
	fprintf(stderr, "%s", what);
	for (size_t i = 0; i < len; i++)
		fprintf(stderr, isprint((unsigned char)data[i]) ? "%c" : "\\x%02x", (unsigned char)data[i]);
	fprintf(stderr, "\n");
}

static void
wrong(const char *expected, size_t expected_len, const char *got, size_t got_len)
{
	fprintf(stderr, "driver: wrong answer\n");
	show("expected: ", expected, expected_len);
	show("got:      ", got, got_len < expected_len + 80 ? got_len : expected_len + 80);
	exit(3);
}

static void
send_all(const char *data, size_t len)
{
	while (len > 0) {
		ssize_t n = write(child_fd, data, len);

		if (n < 0)
			err(4, "write to child");
		data += n;
		len -= n;
	}
}

static void
receive(void)
{
	ssize_t n;

	if (in_len == sizeof in)
		errx(3, "an endless answer");
	if ((n = read(child_fd, in + in_len, sizeof in - in_len)) <= 0)
		errx(4, "the child has closed its socket");
	in_len += n;
}

static int
is_whole(void)
{
	struct header head;

	if (!imsg)
		return in[in_len - 1] == '\n';
	if (in_len < sizeof head)
		return 0;
	memcpy(&head, in, sizeof head);
	return in_len >= head.length;
}

/* One request with exactly one line as its answer, which stays in the buffer. Microseconds from write to whole line. */
static double
ask(const struct line *l)
{
	double begin;

	put_id(l->request + request_id_at, ++next_id);
	in_len = 0;
	begin = now();
	send_all(l->request, l->request_len);
	do
		receive();
	while (!is_whole());
	return now() - begin;
}

/* smtpd ignores the peer id and the process id of a message, so children may differ in them. */
static void
forget_sender(void)
{
	if (imsg)
		memset(in + offsetof(struct header, peer), 0, sizeof(struct header) - offsetof(struct header, peer));
}

static int
is_answered(struct line *l)
{
	put_id(l->reply + reply_id_at, next_id);
	forget_sender();
	return in_len == l->reply_len && memcmp(in, l->reply, in_len) == 0;
}

static int
is_error(void)
{
	static const int32_t verdict = -1;

	if (imsg)
		return in_len == sizeof(struct header) + sizeof verdict &&
		    memcmp(in + sizeof(struct header), &verdict, sizeof verdict) == 0;
	return memmem(in, in_len, "|error|", 7) != NULL;
}

static struct line *
any_line(void)
{
	return &lines[(random64() >> 16) % nlines];
}

/* ---- numbers ---- */

static uint32_t *times; /* nanoseconds; all pages are touched in advance */
static size_t ntimes, times_size;

static void
make_room(size_t n)
{
	free(times);
	if ((times = malloc(n * sizeof *times)) == NULL)
		err(1, "malloc");
	memset(times, 1, n * sizeof *times);
	ntimes = 0;
	times_size = n;
}

static void
record(double us)
{
	if (ntimes < times_size)
		times[ntimes++] = us > 4e6 ? UINT32_MAX : (us < 0 ? 0 : us * 1e3);
}

static int
compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static void
print_times(const char *prefix)
{
	size_t late = 0;

	qsort(times, ntimes, sizeof *times, compare);
	for (size_t i = ntimes; i > 0 && times[i - 1] > LATE_US * 1000u; i--)
		late++;
	if (ntimes > 0)
		printf(", \"%sp50\": %.2f, \"%sp99\": %.2f, \"%smax\": %.2f, \"%slate\": %zu", prefix,
		    times[ntimes / 2] / 1e3, prefix, times[ntimes * 99 / 100] / 1e3, prefix, times[ntimes - 1] / 1e3, prefix,
		    late);
}

/* ---- steps ---- */

static void
warm(double seconds, double started)
{
	double deadline = now() + seconds * 1e6;

	for (;;) {
		ask(&lines[0]);
		if (is_answered(&lines[0]))
			break;
		if (!is_error() || now() > deadline)
			wrong(lines[0].reply, lines[0].reply_len, in, in_len);
		usleep(2000);
	}
	printf(", \"loaded_ms\": %.2f", (now() - started) / 1e3);
	for (int i = 0; i < 3000; i++) {
		struct line *l = any_line();

		ask(l);
		if (!is_answered(l))
			wrong(l->reply, l->reply_len, in, in_len);
	}
}

static void
lookups(size_t n)
{
	make_room(n);
	for (size_t i = 0; i < n; i++) {
		struct line *l = any_line();

		record(ask(l));
		if (!is_answered(l))
			wrong(l->reply, l->reply_len, in, in_len);
		if (i % 4096 == 0)
			alarm(SILENCE_SECONDS);
	}
	print_times("");
}

static void
pipelined(size_t n, size_t window)
{
	static struct line *asked[MAX_WINDOW];
	static char out[MAX_LINE * MAX_WINDOW];
	size_t sent = 0, answered = 0, verified = 0;
	uint32_t first = next_id + 1;
	double begin;

	in_len = 0;
	begin = now();
	while (answered < n) {
		size_t out_len = 0;

		while (sent < n && sent - answered < window) {
			struct line *l = asked[sent % window] = any_line();

			put_id(l->request + request_id_at, ++next_id);
			memcpy(out + out_len, l->request, l->request_len);
			out_len += l->request_len;
			sent++;
		}
		send_all(out, out_len);
		receive();
		verified = 0;
		while (answered < sent) {
			struct line *l = asked[answered % window];
			size_t have = in_len - verified;

			/* Compare what has arrived: wait for the rest of a right line, but not for that of a wrong one. */
			put_id(l->reply + reply_id_at, first + (uint32_t)answered);
			if (memcmp(in + verified, l->reply, have < l->reply_len ? have : l->reply_len) != 0)
				wrong(l->reply, l->reply_len, in + verified, have);
			if (have < l->reply_len)
				break;
			verified += l->reply_len;
			answered++;
		}
		if (answered == sent && verified != in_len)
			errx(3, "more answers than requests");
		memmove(in, in + verified, in_len - verified);
		in_len -= verified;
		if (answered % 4096 < window)
			alarm(SILENCE_SECONDS);
	}
	printf(", \"per_second\": %.0f", n / (now() - begin) * 1e6);
}

static void
soak(double seconds, double rate)
{
	double begin, end, due;
	uint32_t *since_due = NULL;
	size_t n = 0;

	make_room(seconds * (rate > 0 ? rate + 1 : MOST_A_SECOND));
	if (rate > 0 && (since_due = calloc(times_size, sizeof *since_due)) == NULL)
		err(1, "calloc");
	due = begin = now();
	end = begin + seconds * 1e6;
	while (due < end) {
		struct line *l = any_line();

		if (rate > 0) {
			struct timespec t = {(time_t)(due / 1e6), 0};

			t.tv_nsec = (due - t.tv_sec * 1e6) * 1e3;
			while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
				continue;
			record(ask(l));
			since_due[ntimes - 1] = (now() - due) * 1e3;
			due += 1e6 / rate;
		} else {
			record(ask(l));
			due = now();
		}
		if (!is_answered(l))
			wrong(l->reply, l->reply_len, in, in_len);
		if (n++ % 4096 == 0)
			alarm(SILENCE_SECONDS);
	}
	printf(", \"answers\": %zu", n);
	print_times("");
	if (since_due != NULL) {
		memcpy(times, since_due, ntimes * sizeof *times);
		print_times("due_");
		free(since_due);
	}
}

static int
connect_to(const char *host, const char *port)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
	int fd, on = 1;

	if (inet_pton(AF_INET, host, &at.sin_addr) != 1)
		errx(1, "%s is no address", host);
	if ((fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0 ||
	    connect(fd, (struct sockaddr *)&at, sizeof at) < 0)
		err(1, "connect to %s:%s", host, port);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	return fd;
}

static int
put_request(char *out, size_t size, const char *host, const char *path, const char *value, size_t len)
{
	int n = snprintf(out, size, "PUT /v1/kv/%s HTTP/1.1\r\nHost: %s\r\nContent-Length: %zu\r\n\r\n%.*s", path, host,
	    len, (int)len, value);

	if (n < 0 || (size_t)n >= size)
		errx(1, "path too long");
	return n;
}

/* An edit each second by another process, which keeps it out of the measured path. */
static void
edited(double seconds, double rate, const char *host, const char *port, const char *path)
{
	pid_t editor;
	cpu_set_t set;

	fflush(stdout);
	if ((editor = fork()) < 0)
		err(1, "fork");
	if (editor == 0) {
		char http[MAX_LINE], value[32];
		int fd = connect_to(host, port), len;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		memset(&set, 0xff, sizeof set);
		if (driver_cpu >= 0)
			CPU_CLR(driver_cpu, &set);
		sched_setaffinity(0, sizeof set, &set);
		for (uint32_t i = (uint32_t)now();; i++) {
			snprintf(value, sizeof value, "edited-%08x", i);
			len = put_request(http, sizeof http, host, path, value, strlen(value));
			if (write(fd, http, len) != len || read(fd, http, sizeof http) <= 0 ||
			    strncmp(http, "HTTP/1.1 200", 12) != 0)
				_exit(1);
			alarm(0);
			sleep(1);
		}
	}
	soak(seconds, rate);
	if (waitpid(editor, NULL, WNOHANG) != 0)
		errx(4, "the editor has failed");
	kill(editor, SIGKILL);
	waitpid(editor, NULL, 0);
}

static void
edit(const char *host, const char *port, const char *path, size_t n, double think_ms)
{
	struct line *l = &lines[0];
	size_t value_len = l->reply_len - 1 - value_at;
	char http[MAX_LINE], former[MAX_LINE], answer[MAX_LINE], original[8];
	uint32_t *since_return;
	int fd = connect_to(host, port);

	if (value_len < 8 || n < 2)
		errx(1, "the first value is too short to be edited, or there are too few edits");
	if ((since_return = calloc(n, sizeof *since_return)) == NULL)
		err(1, "calloc");
	make_room(n);
	for (size_t i = 0; i < n; i++) {
		double sent, returned = 0, seen = 0;
		size_t polls = 0;
		int http_len;

		usleep(random64() % (uint64_t)(think_ms * 1000 + 1));
		memcpy(former, l->reply, l->reply_len);
		if (i == 0)
			memcpy(original, l->reply + value_at, sizeof original);
		if (i + 1 < n)
			put_hex(l->reply + value_at, (uint32_t)random64());
		else
			memcpy(l->reply + value_at, original, sizeof original);
		http_len = put_request(http, sizeof http, host, path, l->reply + value_at, value_len);
		sent = now();
		if (write(fd, http, http_len) != http_len)
			err(4, "write to Consul");
		while (seen == 0 || returned == 0) {
			if (returned == 0) {
				ssize_t got = recv(fd, answer, sizeof answer - 1, MSG_DONTWAIT);

				if (got > 0) {
					returned = now();
					answer[got] = 0;
					if (strncmp(answer, "HTTP/1.1 200", 12) != 0 || strstr(answer, "true") == NULL)
						errx(4, "Consul: %s", answer);
				} else if (got == 0 || errno != EAGAIN)
					err(4, "read from Consul");
			}
			ask(l);
			if (is_answered(l)) {
				if (seen == 0)
					seen = now();
			} else {
				put_id(former + reply_id_at, next_id);
				if (seen != 0 || in_len != l->reply_len || memcmp(in, former, in_len) != 0)
					wrong(l->reply, l->reply_len, in, in_len);
			}
			if (polls++ % 4096 == 0 && now() - sent < SILENCE_SECONDS * 1e6)
				alarm(SILENCE_SECONDS);
		}
		record(seen - sent);
		since_return[i] = seen > returned ? (seen - returned) * 1e3 : 0;
	}
	print_times("sent_");
	memcpy(times, since_return, n * sizeof *times);
	print_times("returned_");
	free(since_return);
	close(fd);
}

static long
status_kb(pid_t pid, const char *field)
{
	char path[64], text[256];
	size_t len = strlen(field);
	long kb = 0;
	FILE *f;

	snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
	if ((f = fopen(path, "r")) == NULL)
		return 0;
	while (fgets(text, sizeof text, f) != NULL)
		if (strncmp(text, field, len) == 0)
			kb = atol(text + len);
	fclose(f);
	return kb;
}

/* A child's own children count as part of it. */
static void
memory(void)
{
	char command[64];
	long rss = status_kb(child, "VmRSS:"), peak = status_kb(child, "VmHWM:"), pid;
	FILE *f;

	snprintf(command, sizeof command, "cat /proc/%d/task/*/children 2>/dev/null", (int)child);
	if ((f = popen(command, "r")) != NULL) {
		while (fscanf(f, "%ld", &pid) == 1) {
			rss += status_kb(pid, "VmRSS:");
			peak += status_kb(pid, "VmHWM:");
		}
		pclose(f);
	}
	printf(", \"rss_mb\": %.2f, \"peak_mb\": %.2f", rss / 1e3 * 1.024, peak / 1e3 * 1.024);
}

static void
run_step(char *step, double started)
{
	char text[MAX_LINE], *word[6] = {NULL}, *rest = text;
	size_t n = 0;

	snprintf(text, sizeof text, "%s", step);
	while (n < 6 && (word[n] = strsep(&rest, " ")) != NULL)
		n++;
	printf("%s{\"step\": \"%s\"", started < 0 ? "" : ", ", word[0]);
	alarm(SILENCE_SECONDS);
	if (n == 2 && strcmp(word[0], "warm") == 0) {
		alarm(atof(word[1]) + SILENCE_SECONDS);
		warm(atof(word[1]), started < 0 ? -started : started);
	} else if (n == 2 && strcmp(word[0], "lookup") == 0)
		lookups(atol(word[1]));
	else if (n == 3 && !imsg && strcmp(word[0], "pipe") == 0 && atol(word[2]) > 0 && atol(word[2]) <= MAX_WINDOW)
		pipelined(atol(word[1]), atol(word[2]));
	else if ((n == 2 || n == 3) && strcmp(word[0], "soak") == 0)
		soak(atof(word[1]), n == 3 ? atof(word[2]) : 0);
	else if (n == 6 && strcmp(word[0], "edited") == 0)
		edited(atof(word[1]), atof(word[2]), word[3], word[4], word[5]);
	else if (n == 6 && strcmp(word[0], "edit") == 0)
		edit(word[1], word[2], word[3], atol(word[4]), atof(word[5]));
	else if (n == 2 && strcmp(word[0], "sleep") == 0) {
		alarm(0);
		usleep(atof(word[1]) * 1e6);
	} else if (n == 1 && strcmp(word[0], "memory") == 0)
		memory();
	else
		errx(1, "bad step: %s", step);
	printf("}");
}

/* ---- start and end ---- */

/* Write a message of these parts; its length. */
static uint32_t
write_message(char **message, uint32_t type, uint32_t pid, const struct iovec *parts, int count)
{
	struct header head = {.type = type, .pid = pid};
	uint32_t len = sizeof head;

	for (int i = 0; i < count; i++)
		len += parts[i].iov_len;
	if (len > MAX_LINE)
		errx(1, "a message is too long");
	head.length = len;
	if ((*message = malloc(len)) == NULL)
		err(1, "malloc");
	memcpy(*message, &head, len = sizeof head);
	for (int i = 0; i < count; len += parts[i++].iov_len)
		memcpy(*message + len, parts[i].iov_base, parts[i].iov_len);
	return len;
}

/* smtpd 6.8, smtpd.h: enum table_service. */
static int32_t
service_bit(void)
{
	static const char *const names[] = {"alias", "domain", "credentials", "netaddr", "userinfo", "source", "mailaddr",
	    "addrname", "mailaddrmap", "relayhost", "string", "regex"};

	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		if (strcmp(service, names[i]) == 0)
			return 1 << i;
	errx(1, "imsg has no service %s", service);
}

/* smtpd 6.8: table_proc.c, table_proc_lookup, which sends no parameters. */
static void
write_messages(struct line *l, char *key, char *value)
{
	int check = strcmp(op, "check") == 0;
	int32_t bit = service_bit(), verdict = value != NULL;
	size_t parameters = 0;
	struct iovec question[] = {{&bit, sizeof bit}, {&parameters, sizeof parameters}, {key, strlen(key) + 1}};
	struct iovec answer[] = {{&verdict, sizeof verdict}, {value, value == NULL ? 0 : strlen(value) + 1}};

	l->request_len = write_message(&l->request, check ? CHECK : LOOKUP, getpid(), question, 3);
	l->reply_len = write_message(&l->reply, OK, 0, answer, verdict && !check ? 2 : 1);
}

static void
write_lines(struct line *l, char *key, char *value)
{
	l->request_len = asprintf(&l->request, "table|0.1|1719240000.123456|%s|%s|%s|--------|%s\n", table, op, service,
	    key);
	l->reply_len = value == NULL ? asprintf(&l->reply, "%s-result|--------|not-found\n", op)
	    : strcmp(op, "check") == 0 ? asprintf(&l->reply, "%s-result|--------|found\n", op)
	    : asprintf(&l->reply, "%s-result|--------|found|%s\n", op, value);
	if (l->request_len >= MAX_LINE || l->reply_len >= MAX_LINE)
		errx(1, "a line is too long");
}

static void
read_keys(const char *path)
{
	char *text = NULL, *value;
	size_t size = 0, room = 0;
	ssize_t len;
	FILE *f;

	if ((f = fopen(path, "r")) == NULL)
		err(1, "%s", path);
	while ((len = getline(&text, &size, f)) > 0) {
		struct line *l;

		if (text[len - 1] == '\n')
			text[--len] = 0;
		if (nlines == room && (lines = realloc(lines, (room = room * 2 + 1024) * sizeof *lines)) == NULL)
			err(1, "realloc");
		l = &lines[nlines++];
		if ((value = strchr(text, '\t')) != NULL)
			*value++ = 0;
		(imsg ? write_messages : write_lines)(l, text, value);
	}
	fclose(f);
	free(text);
	if (nlines == 0)
		errx(1, "%s: no keys", path);
	request_id_at = strlen("table|0.1|1719240000.123456||||") + strlen(table) + strlen(op) + strlen(service);
	reply_id_at = strlen(op) + strlen("-result|");
	value_at = imsg ? sizeof(struct header) + sizeof(int32_t) : reply_id_at + 8 + strlen("|found|");
}

static void
pin(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set) < 0)
		err(1, "processor %d", cpu);
}

/*
 * smtpd: fork_proc_backend: one socket as stdin and stdout, the table's name as argv[0], and these signals ignored.
 * With imsg, only stdin is the socket.
 */
static void
spawn(char **argv, const char *errors)
{
	int sp[2], fd;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, sp) < 0)
		err(1, "socketpair");
	if ((child = fork()) < 0)
		err(1, "fork");
	if (child == 0) {
		const char *program = argv[0];

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(child_cpu);
		if ((fd = open(errors, O_WRONLY | O_CREAT | O_APPEND, 0600)) < 0 || dup2(fd, 2) < 0 || dup2(sp[0], 0) < 0 ||
		    dup2(imsg ? fd : sp[0], 1) < 0 || chdir("/") < 0)
			_exit(126);
		closefrom(3);
		signal(SIGINT, SIG_IGN);
		signal(SIGTERM, SIG_IGN);
		signal(SIGHUP, SIG_IGN);
		signal(SIGPIPE, SIG_IGN);
		argv[0] = (char *)table;
		execv(program, argv);
		_exit(127);
	}
	close(sp[0]);
	child_fd = sp[1];
}

static void
open_table(void)
{
	static const struct header ok = {.type = OK, .length = sizeof ok};
	static char name[MAX_NAME];
	uint32_t version = VERSION;
	struct iovec parts[] = {{&version, sizeof version}, {name, sizeof name}};
	char *message;
	uint32_t len;

	snprintf(name, sizeof name, "%s", table);
	len = write_message(&message, OPEN, getpid(), parts, 2);
	send_all(message, len);
	free(message);
	do
		receive();
	while (!is_whole());
	forget_sender();
	if (in_len != sizeof ok || memcmp(in, &ok, sizeof ok) != 0)
		errx(3, "wrong answer to OPEN");
}

static void
shake_hands(void)
{
	static const char ready[] = "register|ready\n";
	char hello[MAX_LINE];
	int len = snprintf(hello, sizeof hello,
	    "config|smtpd-version|7.9.0-portable\nconfig|protocol|0.1\nconfig|tablename|%s\nconfig|ready\n", table);

	send_all(hello, len);
	do
		receive();
	while (in_len < sizeof ready - 1 || memcmp(in + in_len - (sizeof ready - 1), ready, sizeof ready - 1) != 0);
}

static void
finish(void)
{
	double begin = now();
	int status = 0;

	shutdown(child_fd, SHUT_WR);
	alarm(0);
	while (waitpid(child, &status, WNOHANG) == 0) {
		if (now() - begin > 5e6) {
			kill(child, SIGKILL);
			waitpid(child, &status, 0);
			errx(4, "the child did not end with its socket");
		}
		usleep(200);
	}
	printf("], \"ended_ms\": %.2f, \"exit\": %d}\n", (now() - begin) / 1e3,
	    WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
}

int
main(int argc, char **argv)
{
	char *steps[MAX_STEPS];
	const char *keys = NULL, *errors = "/dev/null";
	int c, nsteps = 0;
	double started;

	while ((c = getopt(argc, argv, "+p:o:s:t:d:c:e:k:x:")) != -1)
		switch (c) {
		case 'p':
			if (!(imsg = strcmp(optarg, "imsg") == 0) && strcmp(optarg, "lines") != 0)
				errx(1, "no dialect is called %s", optarg);
			break;
		case 'o':
			op = optarg;
			break;
		case 's':
			service = optarg;
			break;
		case 't':
			table = optarg;
			break;
		case 'd':
			driver_cpu = atoi(optarg);
			break;
		case 'c':
			child_cpu = atoi(optarg);
			break;
		case 'e':
			errors = optarg;
			break;
		case 'k':
			keys = optarg;
			break;
		case 'x':
			if (nsteps == MAX_STEPS)
				errx(1, "too many steps");
			steps[nsteps++] = optarg;
			break;
		default:
			return 1;
		}
	argv += optind;
	if (keys == NULL || argv[0] == NULL)
		errx(1, "no keys or no program; see the head of driver.c");
	signal(SIGALRM, silence);
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	pin(driver_cpu);
	alarm(SILENCE_SECONDS);
	started = now();
	spawn(argv, errors);
	(imsg ? open_table : shake_hands)();
	printf("{\"ready_ms\": %.3f, \"steps\": [", (now() - started) / 1e3);
	/* Only after the fork: forking a large process takes longer, and smtpd is small. */
	read_keys(keys);
	for (int i = 0; i < nsteps; i++)
		run_step(steps[i], i == 0 ? -started : started);
	finish();
	return 0;
}
