"""The node agent, against a real small process in serving's place and a real small control plane."""
