# A closure of 300 store paths, 212 MiB, without nixpkgs: /bin/sh and coreutils are its whole
# toolchain. Every shape of file that a NAR can hold is in it, chains of up to four references,
# references to oneself, and one path of more than 200 MiB.
let
  build =
    name: script:
    derivation {
      inherit name;
      system = builtins.currentSystem;
      builder = "/bin/sh";
      PATH = "/usr/bin:/bin";
      args = [ "-e" "-c" script ];
    };

  number = n: (if n < 10 then "00" else if n < 100 then "0" else "") + toString n;
  previous = n: builtins.elemAt paths (n - 1);

  shapes = [
    # A lone executable file that names its own path.
    (n: build "tool-${number n}" ''
      printf '#!/bin/sh\necho %s\n' "$out" >$out; chmod +x $out
    '')
    (n: build "text-${number n}" ''
      echo "${number n} ${previous n}" >$out
    '')
    (n: build "empty-${number n}" ''
      >$out
    '')
    # A store path that is itself a symbolic link.
    (n: build "link-${number n}" ''
      ln -s ${previous n} $out
    '')
    (n: build "tree-${number n}" ''
      mkdir -p $out/bin $out/empty $out/share/doc/a/b/c/d
      echo ${previous n} >$out/share/doc/a/b/c/d/previous
      ln -s ../share/doc $out/bin/doc; ln -s $out/empty $out/self; ln -s /no/such/file $out/dangling
      >$out/share/none; printf '#!/bin/sh\n' >$out/bin/run; chmod +x $out/bin/run
      echo x >"$out/share/name with space"; echo x >$out/share/-dash; echo x >"$out/share/grün"
    '')
    # More than 64 KiB, so that it is streamed before its end is proved.
    (n: build "pages-${number n}" ''
      mkdir $out; seq ${toString n} 20000 >$out/pages
    '')
    (n: build "many-${number n}" ''
      mkdir $out; cd $out; for i in $(seq 120); do echo $i >file-$i; done; echo ${previous 5} >reference
    '')
  ];
  shapeCount = builtins.length shapes;

  paths = builtins.genList (n: (builtins.elemAt shapes (n - shapeCount * (n / shapeCount))) n) 298;
  big = build "big" ''
    mkdir $out; seq 10000000 34000000 >$out/numbers
  '';
in
build "top" ''
  mkdir -p $out/all; cd $out/all
  i=0; for path in ${toString paths} ${big}; do i=$((i+1)); ln -s $path $i; done
''
