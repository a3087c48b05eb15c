"""The load generator and the runs beside other servers."""
