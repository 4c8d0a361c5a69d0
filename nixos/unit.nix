# What both units of Granary are not allowed: as little as Harmonia's is, but for the network, which a
# peer needs. The users have no privileges; the Nix daemon's socket is open to them as to everybody.
{
  # Only for its owner, and only what it owns.
  UMask = "0077";
  NoNewPrivileges = true;
  CapabilityBoundingSet = "";
  AmbientCapabilities = "";
  PrivateUsers = true;
  RestrictSUIDSGID = true;
  RemoveIPC = true;

  # The file system: everything read-only but the state folder.
  ProtectSystem = "strict";
  ProtectHome = true;
  PrivateTmp = true;
  PrivateDevices = true;
  DevicePolicy = "closed";
  ProtectProc = "invisible";
  ProcSubset = "pid";

  # The kernel.
  ProtectKernelTunables = true;
  ProtectKernelModules = true;
  ProtectKernelLogs = true;
  ProtectControlGroups = true;
  ProtectClock = true;
  ProtectHostname = true;
  RestrictNamespaces = true;
  RestrictRealtime = true;
  LockPersonality = true;
  MemoryDenyWriteExecute = true;
  # Netlink tells of changes of the network.
  RestrictAddressFamilies = [
    "AF_UNIX"
    "AF_INET"
    "AF_INET6"
    "AF_NETLINK"
  ];
  SystemCallArchitectures = "native";
  SystemCallFilter = [
    "@system-service"
    "~@privileged"
    "~@resources"
  ];
  SystemCallErrorNumber = "EPERM";

  # As many open files as the kernel takes: a busy node has a connection and a file for each reader.
  LimitNOFILE = 1048576;
}
