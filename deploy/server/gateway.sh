#!/bin/sh
# The one public port, @PORT@. After `fedllm provision revoke` or `renew --server`, end and start it again, or send it SIGHUP.
here=$(cd "$(dirname "$0")" && pwd) || exit 1
exec nginx -c "$here/nginx.conf" -e stderr -g 'daemon off;'
