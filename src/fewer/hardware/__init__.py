"""What a reduction is worth on a machine: closed forms of accelerators, and a roofline measured where it runs."""
