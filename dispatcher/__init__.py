"""The light side of gemma-export: the contract, the ports and the HTTP service. No torch."""
