"""Google Cloud's servers, or what speaks their protocols, on this machine alone: for tests and `make demo-cloud`."""
