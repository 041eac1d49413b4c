#!/bin/bash
# A pool program in bash: calls are frames on descriptor 3, one at a time. It needs jq.
#
# A frame is four bytes of length, little-endian, then JSON. Only numbers and text without NUL are
# the shell's to hold, so jq does what is JSON.
export LC_ALL=C # lengths are bytes

exec <&3 >&3

send() {
	local n=${#1} byte length
	for byte in $((n & 255)) $((n >> 8 & 255)) $((n >> 16 & 255)) $((n >> 24 & 255)); do
		printf -v byte '\\x%02x' "$byte"
		length+=$byte
	done
	printf "$length%s" "$1"
}

# The length of the next frame; fails at the end of calls.
length() {
	local b
	read -r -a b < <(head -c 4 | od -A n -t u1)
	[ ${#b[@]} = 4 ] && size=$((b[0] | b[1] << 8 | b[2] << 16 | b[3] << 24))
}

while length; do
	call=$(head -c "$size")
	case $(jq -r .in <<<"$call") in
	sh.words) answer=$(jq -c '{out: .in, result: (.params | split(" ") | length)}' <<<"$call") ;;
	*) answer='{"out": "error", "result": {"code": 1, "message": "no such method"}}' ;;
	esac
	send "$answer"
done
