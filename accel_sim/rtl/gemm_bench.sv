// Runs the products of a file on the four micro-architectures of the array.
//
// +requests=FILE: per product one line of decimals "unit m k n left_words top_words", then the words of the two memories
// in hexadecimal (lane 0 lowest), one per line. Units: 0 weight-stationary, 1 with shadow weights, 2 output-stationary,
// 3 with overlapped drain. +answers=FILE: per product one line "cycles result_words", then the accumulators.
module gemm_bench #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter DATA_BITS = 8,
    parameter ACCUMULATOR_BITS = 32,
    parameter CAPACITY_BITS = 14  // each memory has so many address bits
)
`ifdef VERILATOR
(
    input logic clk
);
`else
;
  logic clk = 1'b0;
  always #1 clk = !clk;
`endif
  localparam DIM_BITS = 16;
  localparam ADDRESS_BITS = 20;
  localparam LEFT = ROWS * DATA_BITS;
  localparam TOP = COLUMNS * DATA_BITS;
  localparam SUMS = COLUMNS * ACCUMULATOR_BITS;

  logic [LEFT-1:0] left_memory[0:(1<<CAPACITY_BITS)-1];
  logic [TOP-1:0] top_memory[0:(1<<CAPACITY_BITS)-1];
  logic [SUMS-1:0] accumulators[0:(1<<CAPACITY_BITS)-1];

  logic reset, start, running;
  logic [1:0] unit;
  logic [DIM_BITS-1:0] m, k, n;
  logic [31:0] cycles;

  wire [4*ADDRESS_BITS-1:0] left_addresses, top_addresses, write_addresses;
  wire [3:0] valids, accumulates, dones;
  wire [4*SUMS-1:0] write_words;
  wire [CAPACITY_BITS-1:0] left_address = left_addresses[unit*ADDRESS_BITS+:CAPACITY_BITS];
  wire [CAPACITY_BITS-1:0] top_address = top_addresses[unit*ADDRESS_BITS+:CAPACITY_BITS];
  wire [CAPACITY_BITS-1:0] write_address = write_addresses[unit*ADDRESS_BITS+:CAPACITY_BITS];
  wire [SUMS-1:0] write_word = write_words[unit*SUMS+:SUMS];
  wire [LEFT-1:0] left_word = left_memory[left_address];
  wire [TOP-1:0] top_word = top_memory[top_address];

  genvar u, c;
  generate
    for (u = 0; u < 4; u = u + 1) begin : micro_architecture
      localparam [1:0] UNIT = u[1:0];
      gemm_unit #(
          .ROWS(ROWS),
          .COLUMNS(COLUMNS),
          .DATA_BITS(DATA_BITS),
          .ACCUMULATOR_BITS(ACCUMULATOR_BITS),
          .OUTPUT_STATIONARY(u / 2),
          .WEIGHT_SHADOW(u % 2),
          .DRAIN_OVERLAP(u % 2),
          .DIM_BITS(DIM_BITS),
          .ADDRESS_BITS(ADDRESS_BITS)
      ) gemm (
          .clk(clk),
          .reset(reset),
          .start(start && unit == UNIT),
          .m(m),
          .k(k),
          .n(n),
          .left_address(left_addresses[u*ADDRESS_BITS+:ADDRESS_BITS]),
          .left_word(left_word),
          .top_address(top_addresses[u*ADDRESS_BITS+:ADDRESS_BITS]),
          .top_word(top_word),
          .write_valid(valids[u]),
          .write_accumulate(accumulates[u]),
          .write_address(write_addresses[u*ADDRESS_BITS+:ADDRESS_BITS]),
          .write_word(write_words[u*SUMS+:SUMS]),
          .done(dones[u])
      );
    end
  endgenerate

  wire [SUMS-1:0] stored = accumulators[write_address];
  wire [SUMS-1:0] summed;
  generate
    for (c = 0; c < COLUMNS; c = c + 1) begin : column
      localparam LOW = c * ACCUMULATOR_BITS;
      assign summed[LOW+:ACCUMULATOR_BITS] = write_word[LOW+:ACCUMULATOR_BITS] +
          (accumulates[unit] ? stored[LOW+:ACCUMULATOR_BITS] : {ACCUMULATOR_BITS{1'b0}});
    end
  endgenerate
  always_ff @(posedge clk) if (valids[unit]) accumulators[write_address] <= summed;

  // the file's side
  /* verilator lint_off BLKSEQ */
  integer requests, answers, read, i, left_words, top_words, result_words;
  integer unit_read, m_read, k_read, n_read;
  logic [LEFT-1:0] left_read;
  logic [TOP-1:0] top_read;
  reg [8*1024-1:0] path;
  logic answering;
  logic [2:0] warm_up;

  initial begin
    reset = 1'b1;
    start = 1'b0;
    running = 1'b0;
    answering = 1'b0;
    warm_up = 3'd7;
    cycles = 32'd0;
    unit = 2'd0;
    m = 0;
    k = 0;
    n = 0;
    if ($value$plusargs("requests=%s", path) == 0) path = "";
    requests = $fopen(path, "r");
    if ($value$plusargs("answers=%s", path) == 0) path = "";
    answers = $fopen(path, "w");
    if (requests == 0 || answers == 0) begin
      $display("gemm_bench: +requests=FILE and +answers=FILE have to be files that can be opened");
      $finish;
    end
  end

  always @(posedge clk) begin
    if (warm_up != 3'd0) begin
      warm_up <= warm_up - 3'd1;
      reset   <= warm_up != 3'd1;
    end else if (start || running) begin
      cycles <= cycles + 32'd1;
      start <= 1'b0;
      running <= !dones[unit];
      answering <= dones[unit];
    end else if (answering) begin  // a cycle after the last write
      $fwrite(answers, "%0d %0d\n", cycles, result_words);
      for (i = 0; i < result_words; i = i + 1) $fwrite(answers, "%h\n", accumulators[i]);
      answering <= 1'b0;
    end else begin
      read = $fscanf(
          requests, "%d %d %d %d %d %d\n", unit_read, m_read, k_read, n_read, left_words, top_words
      );
      if (read != 6) begin
        $fclose(answers);
        $finish;
      end else begin
        // by way of a variable: Verilator 5.006 reads zeros where $fscanf names an element of more than 64 bits
        for (i = 0; i < left_words; i = i + 1) begin
          read = $fscanf(requests, "%h\n", left_read);
          left_memory[i] = left_read;
        end
        for (i = 0; i < top_words; i = i + 1) begin
          read = $fscanf(requests, "%h\n", top_read);
          top_memory[i] = top_read;
        end
        result_words = m_read * ((n_read + COLUMNS - 1) / COLUMNS);
        unit <= unit_read[1:0];
        m <= m_read[DIM_BITS-1:0];
        k <= k_read[DIM_BITS-1:0];
        n <= n_read[DIM_BITS-1:0];
        cycles <= 32'd0;
        start <= 1'b1;
      end
    end
  end
endmodule
