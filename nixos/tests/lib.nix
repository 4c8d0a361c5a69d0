# As much of nixpkgs' `lib` as our modules use, so that they can be evaluated by any Nix, without a
# network: options, definitions with conditions and priorities, types that merge and refuse, freeform
# submodules. Where it behaves differently from nixpkgs, nixpkgs is right; `evaluate.nix` takes either.
let
  inherit (builtins)
    all
    any
    attrNames
    concatLists
    concatMap
    concatStringsSep
    elemAt
    filter
    foldl'
    genList
    head
    isAttrs
    isBool
    isFloat
    isFunction
    isInt
    isList
    isPath
    isString
    length
    listToAttrs
    map
    removeAttrs
    sort
    stringLength
    substring
    ;

  show = place: concatStringsSep "." place;

  # --- Definitions. One is { file; value; priority; order; }.

  isKind = kind: value: isAttrs value && (value._type or null) == kind;

  # What is left of a definition once its conditions, alternatives and priorities are taken off.
  discharge =
    definition:
    let
      inherit (definition) value;
      inner = content: definition // { value = content; };
    in
    if isKind "if" value then
      (if value.condition then discharge (inner value.content) else [ ])
    else if isKind "merge" value then
      concatMap (content: discharge (inner content)) value.contents
    else if isKind "override" value then
      discharge (inner value.content // { inherit (value) priority; })
    else if isKind "order" value then
      discharge (inner value.content // { order = value.priority; })
    else
      [ definition ];

  strongest =
    definitions:
    let
      priority = foldl' (least: one: if one.priority < least then one.priority else least) 9999 definitions;
      kept = filter (one: one.priority == priority) definitions;
    in
    sort (a: b: a.order < b.order) kept;

  # A definition of a set of options, as definitions by name. Conditions are carried down unasked, for
  # they may depend on what is being defined.
  pushDown =
    definition:
    let
      inherit (definition) value;
      under = wrap: content: map (one: one // { value = builtins.mapAttrs (_: wrap) one.value; }) (
        pushDown (definition // { value = content; })
      );
    in
    if isKind "if" value then
      under (inner: mkIf value.condition inner) value.content
    else if isKind "override" value then
      under (inner: mkOverride value.priority inner) value.content
    else if isKind "merge" value then
      concatMap (content: pushDown (definition // { value = content; })) value.contents
    else
      [ definition ];

  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };

  # --- Modules.

  collect =
    arguments: file: module:
    if isPath module || isString module then
      collect arguments (toString module) (import module)
    else if isFunction module then
      collect arguments file (module arguments)
    else
      let
        isFull = module ? options || module ? config;
        own = {
          inherit file;
          options = module.options or { };
          config = if isFull then module.config or { } else removeAttrs module [ "imports" ];
          freeform = module.freeformType or null;
        };
        isBare = !isFull && module ? freeformType;
      in
      [ (if isBare then own // { config = removeAttrs own.config [ "freeformType" ]; } else own) ]
      ++ concatMap (collect arguments file) (module.imports or [ ]);

  mergeOptions =
    place: a: b:
    a
    // builtins.mapAttrs (
      name: option:
      if !(a ? ${name}) then
        option
      else if isKind "option" option || isKind "option" a.${name} then
        throw "The option `${show (place ++ [ name ])}' is declared twice."
      else
        mergeOptions (place ++ [ name ]) a.${name} option
    ) b;

  unique' = names: attrNames (listToAttrs (map (name: { inherit name; value = null; }) names));

  evaluateTree =
    place: options: freeform: definitions:
    let
      pushed = map (
        one:
        if isAttrs one.value then
          one
        else
          throw "A definition for `${show place}' in `${one.file}' is not a set."
      ) (concatMap pushDown definitions);
      of = name: concatMap (one: if one.value ? ${name} then [ (one // { value = one.value.${name}; }) ] else [ ]) pushed;
      unknown = filter (name: !(options ? ${name})) (unique' (concatMap (one: attrNames one.value) pushed));
      known = builtins.mapAttrs (
        name: option:
        let
          inner = place ++ [ name ];
        in
        if isKind "option" option then
          evaluateOption inner option (of name)
        else
          evaluateTree inner option freeform (of name)
      ) options;
      free = listToAttrs (
        map (name: {
          inherit name;
          value = evaluateOption (place ++ [ name ]) { type = freeform.element; } (of name);
        }) unknown
      );
    in
    if freeform != null then
      free // known
    else if unknown != [ ] then
      throw "The option `${show (place ++ [ (head unknown) ])}' does not exist. It is defined in `${(head (of (head unknown))).file}'."
    else
      known;

  evaluateOption =
    place: option: definitions:
    let
      default = if option ? default then [ { file = "the default"; value = option.default; priority = 1500; order = 1000; } ] else [ ];
      kept = strongest (concatMap discharge (definitions ++ default));
      wrong = filter (one: !(option.type.check one.value)) kept;
    in
    if kept == [ ] then
      throw "The option `${show place}' was accessed but has no value defined. Try setting the option."
    else if wrong != [ ] then
      throw "A definition for option `${show place}' is not of type `${option.type.description}'. It is defined in `${(head wrong).file}'."
    else
      option.type.merge place kept;

  evalModules =
    {
      modules,
      specialArgs ? { },
      prefix ? [ ],
    }:
    let
      arguments = specialArgs // {
        inherit config;
        lib = self;
      };
      collected = concatMap (collect arguments "<unknown file>") modules;
      options = foldl' (mergeOptions prefix) { } (map (module: module.options) collected);
      freeforms = filter (freeform: freeform != null) (map (module: module.freeform) collected);
      freeform = if freeforms == [ ] then null else head freeforms;
      definitions = map (module: {
        inherit (module) file;
        value = module.config;
        priority = 100;
        order = 1000;
      }) collected;
      config = evaluateTree prefix options freeform definitions;
    in
    {
      inherit config options;
    };

  # --- Types.

  leaf = description: check: {
    inherit description check;
    merge =
      place: definitions:
      let
        first = (head definitions).value;
      in
      if all (one: one.value == first) definitions then
        first
      else
        throw "The option `${show place}' has conflicting definition values.";
  };

  mergeAll = element: place: definitions: builtins.listToAttrs (
    concatMap (
      name:
      let
        of = concatMap (one: if one.value ? ${name} then [ (one // { value = one.value.${name}; }) ] else [ ]) definitions;
        # One whose condition is false is not there.
        isThere = concatMap discharge of != [ ];
      in
      if isThere then [ { inherit name; value = evaluateOption (place ++ [ name ]) { type = element; } of; } ] else [ ]
    ) (unique' (concatMap (one: attrNames one.value) definitions))
  );

  types = rec {
    bool = leaf "boolean" isBool;
    int = leaf "signed integer" isInt;
    float = leaf "floating point number" isFloat;
    str = leaf "string" isString;
    lines = leaf "strings concatenated with \"\\n\"" isString // {
      merge = _: definitions: concatStringsSep "\n" (map (one: one.value) definitions);
    };
    path = leaf "path" (value: isPath value || (isString value && substring 0 1 value == "/"));
    package = leaf "package" (value: isAttrs value && value ? outPath);
    ints.unsigned = leaf "unsigned integer, meaning >=0" (value: isInt value && value >= 0);
    raw = leaf "raw value" (_: true);
    anything = {
      description = "anything";
      check = _: true;
      merge =
        place: definitions:
        if all (one: isAttrs one.value && !(one.value ? outPath)) definitions then
          mergeAll anything place (map (one: one) definitions)
        else
          raw.merge place definitions;
    };
    nullOr = element: {
      description = "null or ${element.description}";
      check = value: value == null || element.check value;
      merge =
        place: definitions:
        if all (one: one.value == null) definitions then null else element.merge place definitions;
    };
    listOf = element: {
      description = "list of ${element.description}";
      check = isList;
      merge =
        place: definitions:
        concatMap (
          one:
          concatMap (
            value:
            let
              definition = one // { inherit value; priority = 100; };
            in
            if discharge definition == [ ] then [ ] else [ (evaluateOption (place ++ [ "*" ]) { type = element; } [ definition ]) ]
          ) one.value
        ) definitions;
    };
    attrsOf = element: {
      inherit element;
      description = "attribute set of ${element.description}";
      check = isAttrs;
      merge = place: definitions: mergeAll element place (concatMap pushDown (map (one: one // { priority = 100; }) definitions));
    };
    oneOf = elements: {
      description = concatStringsSep " or " (map (element: element.description) elements);
      check = value: any (element: element.check value) elements;
      merge =
        place: definitions:
        let
          fitting = filter (element: all (one: element.check one.value) definitions) elements;
        in
        if fitting == [ ] then throw "The option `${show place}' has definitions of several types." else (head fitting).merge place definitions;
    };
    either = a: b: oneOf [ a b ];
    submodule = module: {
      description = "submodule";
      check = value: isAttrs value || isFunction value || isPath value;
      merge =
        place: definitions:
        (evalModules {
          prefix = place;
          modules = [ module ] ++ map (one: { config = one.value; }) definitions;
        }).config;
    };
  };

  self = rec {
    inherit
      evalModules
      mkIf
      mkOverride
      types
      concatMap
      filter
      head
      any
      all
      ;
    mkOption = option: { _type = "option"; } // option;
    mkEnableOption = name: mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether to enable ${name}.";
    };
    mkMerge = contents: {
      _type = "merge";
      inherit contents;
    };
    mkDefault = mkOverride 1000;
    mkForce = mkOverride 50;
    mkBefore = content: {
      _type = "order";
      priority = 500;
      inherit content;
    };
    literalExpression = text: {
      _type = "literalExpression";
      inherit text;
    };
    toList = value: if isList value then value else [ value ];
    toInt = text: builtins.fromJSON text;
    last = list: elemAt list (length list - 1);
    take = count: list: genList (elemAt list) (if count < length list then count else length list);
    imap0 = f: list: genList (n: f n (elemAt list n)) (length list);
    optional = condition: value: if condition then [ value ] else [ ];
    unique = foldl' (seen: one: if builtins.elem one seen then seen else seen ++ [ one ]) [ ];
    splitString = separator: text: filter isString (builtins.split (escape separator) text);
    escape = text: if text == "." then "\\." else text;
    hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
    removePrefix = prefix: text: if hasPrefix prefix text then substring (stringLength prefix) (stringLength text) text else text;
    removeSuffix =
      suffix: text:
      let
        rest = stringLength text - stringLength suffix;
      in
      if rest >= 0 && substring rest (stringLength text) text == suffix then substring 0 rest text else text;
    mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
    concatMapStringsSep = separator: f: list: concatStringsSep separator (map f list);
  };
in
self
