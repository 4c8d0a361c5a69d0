#!/usr/bin/env bash
# Makes the vectors here, and the nix-2.8-* narinfos of ../corpus/narinfo, with the real Nix.
#
#   sudo unshare --mount ./generate.sh /tmp/vectors
#
# In its own mount namespace, because the paths shall be in /nix/store without touching the one of
# this machine: an empty directory is mounted over /nix. Works offline. Every run makes another
# key pair; the secret-key committed here signs test data only. Made with Debian's Nix 2.8.0.
set -euo pipefail
out=$1; mkdir -p $out
w=$(mktemp -d)
cd $w
export NIX_CONFIG=$'extra-experimental-features = nix-command ca-derivations\nbuild-users-group =\nsandbox = false\nsubstituters ='
export HOME=$w/home; mkdir -p $HOME
mkdir -p $w/nix/store $w/nix/var /nix; mount --bind $w/nix /nix
nix-store --generate-binary-cache-key granary-test-1 $w/sk $w/pk
cp sk $out/secret-key; cp pk $out/public-key
cat > t.nix <<'NIX'
let
  sh = "/bin/sh";
  mk = name: script: attrs: derivation ({ inherit name; system = builtins.currentSystem; builder = sh; args = [ "-c" script ]; PATH = "/usr/bin:/bin"; } // attrs);
in rec {
  none = mk "zero-refs-1.0" "echo none > $out" {};
  self = mk "self+ref.1_2?a=b" "mkdir $out; echo $out > $out/me" {};
  one = mk "one-ref-1.0" "echo ${none} > $out" {};
  many = mk "many-refs-2.0" "mkdir $out; echo $out ${none} ${self} ${one} ${text} > $out/refs" {};
  text = builtins.toFile "text-source.txt" "text\n";
  textref = builtins.toFile "text-with-ref.txt" "see ${text}\n";
  caself = mk "ca-self" "mkdir $out; echo $out > $out/me" { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  careflist = mk "ca-with-refs" "echo ${none} ${one} > $out" { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  empty = mk "empty-dir" "mkdir $out" {};
  multi = mk "multi-out" "echo a > $out; echo b > $dev" { outputs = [ "out" "dev" ]; };
}
NIX
echo "hello" > "hello-2.12.1.txt"; mkdir -p "src_dir+x?=1"; echo a > "src_dir+x?=1/a"; ln -s a "src_dir+x?=1/l"; printf '#!/bin/sh\n' > run.sh; chmod +x run.sh
for a in none self one many empty multi caself careflist; do nix-build --no-out-link t.nix -A $a 2>>build.log || { tail build.log >&2; }; done > built
nix-instantiate --eval --strict --read-write-mode t.nix -A textref >> built.text
nix-instantiate --eval --strict --read-write-mode t.nix -A text >> built.text
nix-store --add "hello-2.12.1.txt" > added; nix-store --add "src_dir+x?=1" >> added; nix-store --add run.sh >> added
: > fixed
for algo in md5 sha1 sha256 sha512; do
  nix-store --add-fixed $algo "hello-2.12.1.txt" >> fixed
  nix-store --add-fixed --recursive $algo "src_dir+x?=1" >> fixed
done
cat added fixed > adds
# content address vectors: <ca> <path> <refs...>
all=$(cat built adds; tr -d '"' < built.text)
nix path-info --json $all > info.json
python3 - info.json > $out/content-addresses.txt <<'PY'
import json,sys
seen=set()
for p in sorted(json.load(open(sys.argv[1])),key=lambda p:p.get('path','')):
    if p.get('ca') and p['path'] not in seen:
        seen.add(p['path']); print(p['ca'],p['path'],*sorted(p['references']))
PY
# drvs are text CA too
for d in $(nix-instantiate t.nix -A many -A one -A multi 2>/dev/null); do nix path-info --json --derivation $d 2>/dev/null || true; done > drv.json
python3 - drv.json >> $out/content-addresses.txt <<'PY'
import json,sys
dec=json.JSONDecoder(); s=open(sys.argv[1]).read().strip()
while s:
    v,i=dec.raw_decode(s); s=s[i:].strip()
    for p in v:
        if p.get('ca'): print(p['ca'],p['path'],*sorted(p['references']))
PY
# print-fixed-path
: > $out/fixed-paths.txt
for algo in md5 sha1 sha256 sha512; do for rec in "" --recursive; do for n in hello-2.12.1.txt 'a?b=c+d_e.f-g' .foo; do
  h=$(nix-hash --flat --type $algo --base32 hello-2.12.1.txt)
  echo "fixed:${rec:+r:}$algo:$h $(nix-store --print-fixed-path $rec $algo $h $n)" >> $out/fixed-paths.txt
done; done; done
# hashes
: > $out/hashes.txt
for algo in md5 sha1 sha256 sha512; do for f in hello-2.12.1.txt run.sh /dev/null; do
  h=$(nix-hash --flat --type $algo $f)
  echo "$algo $(nix hash to-base16 --type $algo $h) $(nix hash to-base32 --type $algo $h) $(nix hash to-base64 --type $algo $h) $(nix hash to-sri --type $algo $h)" >> $out/hashes.txt
done; done
# narinfos: sign with the key, and copy with each compression
for c in none xz bzip2 zstd gzip br; do
  nix copy --to "file://$w/cache-$c?compression=$c&secret-key=$w/sk" $all >>copy.log 2>&1 || { tail copy.log; }
done
nix copy --to "file://$w/cache-unsigned?compression=xz" $all >>copy.log 2>&1
for c in none xz bzip2 zstd gzip br unsigned; do for f in cache-$c/*.narinfo; do
  n=$(sed -n 's/^StorePath: .*-\(.*\)$/\1/p' $f); full=$(sed -n 's,^StorePath: /nix/store/,,p' $f)
  cp $f "$out/nix-2.8-$c-$(echo ${full:33} | tr '?+=' '___')-${full:0:6}.narinfo"
done; done
cat cache-none/nix-cache-info > $out/nix-cache-info
