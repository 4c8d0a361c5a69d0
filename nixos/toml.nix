# TOML as text, known at evaluation: what is written can be compared by a test, and nothing but the
# binary itself is needed to check it. `null` stands for "not set" and is left out.
#
# JSON's texts and numbers are TOML's as well, except for control characters that no setting of ours has.
{ lib }:

let
  inherit (builtins)
    attrNames
    concatLists
    concatStringsSep
    filter
    isAttrs
    isList
    map
    match
    toJSON
    ;

  isTable = value: isAttrs value && !(value ? outPath);
  isTableArray = value: isList value && value != [ ] && builtins.all isTable value;

  key = name: if match "[A-Za-z0-9_-]+" name != null then name else toJSON name;

  inline =
    value:
    if isTable value then
      "{ ${concatStringsSep ", " (pairs value)} }"
    else if isList value then
      "[${concatStringsSep ", " (map inline value)}]"
    else if builtins.isPath value || isAttrs value then
      # A path would be copied into the store, where everybody may read it: it is named instead.
      toJSON (toString value)
    else
      toJSON value;

  names = table: filter (name: table.${name} != null) (attrNames table);
  pairs = table: map (name: "${key name} = ${inline table.${name}}") (names table);

  section =
    place: table:
    let
      isBelow = name: isTable table.${name} || isTableArray table.${name};
      here = filter (name: !isBelow name) (names table);
      below = filter isBelow (names table);
      lines = map (name: "${key name} = ${inline table.${name}}") here;
      one =
        name:
        let
          inner = place ++ [ (key name) ];
          value = table.${name};
          dotted = concatStringsSep "." inner;
        in
        if isTable value then
          (if names value == [ ] then [ ] else [ "[${dotted}]" ] ++ section inner value)
        else
          concatLists (map (item: [ "[[${dotted}]]" ] ++ section inner item) value);
    in
    lines ++ concatLists (map one below);
in
{
  toToml = table: concatStringsSep "\n" (section [ ] table) + "\n";

  # Whatever TOML can say.
  type =
    let
      inherit (lib) types;
      value = types.nullOr (
        types.oneOf [
          types.bool
          types.int
          types.float
          types.str
          types.path
          (types.attrsOf value)
          (types.listOf value)
        ]
      )
      // {
        description = "TOML value";
      };
    in
    types.attrsOf value;
}
