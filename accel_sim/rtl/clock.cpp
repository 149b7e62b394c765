// The clock of a bench under Verilator; the bench itself reads, runs and writes, and calls $finish.
#include "Vbench.h"
#include "verilated.h"

double sc_time_stamp() { return 0; }

int main(int argc, char** argv) {
    Verilated::commandArgs(argc, argv);
    Vbench bench;
    while (!Verilated::gotFinish()) {
        bench.clk = 0;
        bench.eval();
        bench.clk = 1;
        bench.eval();
    }
    bench.final();
    return 0;
}
