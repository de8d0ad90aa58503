/*
 * smtpd's lookup in a table from a file (table_static.c, table_static_lookup): all entries in turn for each request,
 * each parsed anew (table.c, *_match). It speaks the dialect of smtpd-tables(7), so that it can be measured like
 * table-consul; in smtpd itself the walk costs the same, without the socket.
 *
 *   walk SERVICE ENTRIES
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <err.h>
#include <limits.h>
#include <regex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

struct network {
	int family, bits;
	unsigned char address[16];
};

struct mailaddr {
	char user[256], domain[256];
};

static char **entries;
static size_t count;

static int
equal(const char *asked, const char *entry)
{
	return strcmp(asked, entry) == 0;
}

static int
domain(const char *asked, const char *entry)
{
	for (; *entry && *asked; entry++, asked++) {
		if (*entry == '*') {
			entry += strspn(entry, "*");
			while (*asked && tolower((unsigned char)*asked) != tolower((unsigned char)*entry))
				asked++;
			if (!*asked || !*entry)
				break;
		} else if (tolower((unsigned char)*asked) != tolower((unsigned char)*entry))
			return 0;
	}
	return !*entry && !*asked;
}

static int
parse_network(const char *text, struct network *to)
{
	char bare[INET6_ADDRSTRLEN + 8];
	size_t len;

	if (strncasecmp(text, "IPv6:", 5) == 0)
		text += 5;
	memset(to, 0, sizeof *to);
	to->family = AF_INET;
	if ((to->bits = inet_net_pton(AF_INET, text, to->address, 4)) != -1)
		return 1;
	if (*text == '[')
		text++;
	if ((len = strlen(text)) >= sizeof bare)
		return 0;
	memcpy(bare, text, len + 1);
	if (len > 0 && bare[len - 1] == ']')
		bare[len - 1] = '\0';
	to->family = AF_INET6;
	to->bits = 128;
	if ((text = strchr(bare, '/')) != NULL) {
		to->bits = atoi(text + 1);
		bare[text - bare] = '\0';
	}
	return to->bits >= 0 && to->bits <= 128 && inet_pton(AF_INET6, bare, to->address) == 1;
}

static int
netaddr(const char *asked, const char *entry)
{
	struct network host, net;
	int whole;

	if (strcasecmp(asked, entry) == 0)
		return 1;
	if (!parse_network(asked, &host) || !parse_network(entry, &net) || host.family != net.family)
		return 0;
	whole = net.bits / 8;
	return memcmp(host.address, net.address, whole) == 0 &&
	    (net.bits % 8 == 0 || (host.address[whole] ^ net.address[whole]) >> (8 - net.bits % 8) == 0);
}

static int
parse_mailaddr(const char *text, struct mailaddr *to)
{
	const char *at = strrchr(text, '@');
	size_t user = at == NULL ? strlen(text) : (size_t)(at - text);

	memset(to, 0, sizeof *to);
	if (user >= sizeof to->user || (at != NULL && strlen(at) > sizeof to->domain))
		return 0;
	memcpy(to->user, text, user);
	if (at != NULL)
		strcpy(to->domain, at + 1);
	return 1;
}

static int
mailaddr(const char *asked, const char *entry)
{
	struct mailaddr a, e;

	if (!parse_mailaddr(asked, &a) || !parse_mailaddr(entry, &e))
		return 0;
	if (e.domain[0] && !domain(a.domain, e.domain))
		return 0;
	if (e.user[0] && strchr(e.user, '+') == NULL)
		a.user[strcspn(a.user, "+")] = '\0';
	return !e.user[0] || strcasecmp(a.user, e.user) == 0;
}

static int
regex(const char *asked, const char *entry)
{
	int found, flags = REG_EXTENDED | REG_NOSUB;
	regex_t compiled;

	if (strncmp(entry, "(?i)", 4) == 0) {
		flags |= REG_ICASE;
		entry += 4;
	}
	if (regcomp(&compiled, entry, flags) != 0)
		return 0;
	found = regexec(&compiled, asked, 0, NULL, 0) == 0;
	regfree(&compiled);
	return found;
}

static const struct {
	const char *name;
	int (*match)(const char *, const char *);
} services[] = {
	{ "alias", equal }, { "domain", domain }, { "netaddr", netaddr }, { "mailaddr", mailaddr }, { "regex", regex },
};

static void
load(const char *path)
{
	FILE *file = fopen(path, "r");
	char *line = NULL;
	size_t room = 0, held = 0;
	ssize_t len;

	if (file == NULL)
		err(1, "%s", path);
	while ((len = getline(&line, &room, file)) > 0) {
		line[len - 1] = '\0';
		if (count == held && (entries = reallocarray(entries, held = held ? held * 2 : 1024, sizeof *entries)) == NULL)
			err(1, "reallocarray");
		if ((entries[count++] = strdup(line)) == NULL)
			err(1, "strdup");
	}
	free(line);
	fclose(file);
}

int
main(int argc, char **argv)
{
	int (*match)(const char *, const char *) = NULL;
	char line[4096], *at[7];
	size_t i;

	for (i = 0; argc == 3 && i < sizeof services / sizeof *services; i++)
		if (strcmp(argv[1], services[i].name) == 0)
			match = services[i].match;
	if (match == NULL)
		errx(1, "usage: walk SERVICE ENTRIES");
	load(argv[2]);
	setvbuf(stdout, NULL, _IOFBF, BUFSIZ);
	while (fgets(line, sizeof line, stdin) != NULL) {
		line[strcspn(line, "\n")] = '\0';
		if (strcmp(line, "config|ready") == 0)
			printf("register|%s\nregister|ready\n", argv[1]);
		else if (strncmp(line, "table|", 6) == 0) {
			char *p = line;
			for (i = 0; i < 7; i++) {
				if ((p = strchr(p, '|')) == NULL)
					errx(1, "bad request");
				at[i] = p++;
			}
			for (i = 0; i < count && !match(p, entries[i]); i++)
				;
			*at[4] = *at[6] = '\0';
			printf("%s-result|%s|%s\n", at[3] + 1, at[5] + 1, i < count ? "found" : "not-found");
		}
		fflush(stdout);
	}
	return 0;
}
