"""What a run survives, shown: processes killed, files damaged, disks full."""
