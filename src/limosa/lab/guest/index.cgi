#!/bin/sh
# The page of the guest. One byte is appended for each visit, so visits at the same time do not lose one.
printf . >>/run/visits
read -r uptime _ </proc/uptime
visits=$(stat -c %s /run/visits)
number=$(cat /run/number 2>/dev/null || echo 0)
printf 'Content-Type: text/plain\r\n\r\n'
printf 'host %s\nuptime %s\nvisits %s\nnumber %s\n' "$(hostname)" "$uptime" "$visits" "$number"
