// Runs the tiled products of a file on the whole machine: the tile pipeline with the array, its operand and accumulator
// buffers and the contents of the DRAM.
//
// +requests=FILE: per program one line of decimals "steps buffers latency rate pipelined ties left_words top_words", then
// per step one line "m k n left_slot top_slot left_words top_words load_bytes store_bytes", then the words that the
// loads bring, in their order: all for the left buffers, all for the top ones (hexadecimal, lane 0 lowest).
// +answers=FILE: per program the accumulators of each tile as its store ends, then a line with the cycles.
//
// So that no order of events passes by luck: a buffer holds garbage from the cycle in which the channel takes its load
// until the load's last byte, and a tile leaves the accumulators with its store's last byte.
module machine_bench #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter DATA_BITS = 8,
    parameter ACCUMULATOR_BITS = 32,
    parameter OUTPUT_STATIONARY = 0,
    parameter WEIGHT_SHADOW = 1,
    parameter DRAIN_OVERLAP = 1,
    parameter STEP_BITS = 10,
    parameter CAPACITY_BITS = 12  // address bits of a buffer
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
  localparam BYTES_BITS = 24;
  localparam LEFT = ROWS * DATA_BITS;
  localparam TOP = COLUMNS * DATA_BITS;
  localparam SUMS = COLUMNS * ACCUMULATOR_BITS;
  localparam DRAM_BITS = CAPACITY_BITS + 4;

  // the step table
  logic [DIM_BITS-1:0] m_table[0:(1<<STEP_BITS)-1];
  logic [DIM_BITS-1:0] k_table[0:(1<<STEP_BITS)-1];
  logic [DIM_BITS-1:0] n_table[0:(1<<STEP_BITS)-1];
  logic [1:0] left_slots[0:(1<<STEP_BITS)-1];
  logic [1:0] top_slots[0:(1<<STEP_BITS)-1];
  integer left_counts[0:(1<<STEP_BITS)-1];
  integer top_counts[0:(1<<STEP_BITS)-1];
  logic [BYTES_BITS-1:0] load_table[0:(1<<STEP_BITS)-1];
  logic [BYTES_BITS-1:0] store_table[0:(1<<STEP_BITS)-1];

  // the memories
  logic [LEFT-1:0] left_dram[0:(1<<DRAM_BITS)-1];
  logic [TOP-1:0] top_dram[0:(1<<DRAM_BITS)-1];
  logic [LEFT-1:0] left_buffers[0:(4<<CAPACITY_BITS)-1];
  logic [TOP-1:0] top_buffers[0:(4<<CAPACITY_BITS)-1];
  logic [SUMS-1:0] accumulators[0:(4<<CAPACITY_BITS)-1];

  logic reset, start, running;
  logic [STEP_BITS-1:0] steps;
  logic [1:0] buffers;
  logic [6:0] latency;
  logic [BYTES_BITS+7:0] rate;
  logic pipelined, ties;

  wire [STEP_BITS-1:0] load_step, compute_step;
  wire load_take, load_done, store_done, compute_start, compute_done, finished;
  wire [31:0] cycles;

  tile_pipeline #(
      .STEP_BITS (STEP_BITS),
      .BYTES_BITS(BYTES_BITS)
  ) pipeline (
      .clk(clk),
      .reset(reset),
      .buffers(buffers),
      .latency(latency),
      .rate(rate),
      .way_rate(rate),
      .pipelined(pipelined),
      .store_on_channel(1'b1),
      .ties(ties),
      .start(start),
      .steps(steps),
      .load_step(load_step),
      .load_bytes(load_table[load_step]),
      .compute_step(compute_step),
      .store_bytes(store_table[compute_step]),
      .compute_start(compute_start),
      .compute_done(compute_done),
      .load_take(load_take),
      .load_done(load_done),
      .store_done(store_done),
      .finished(finished),
      .cycles(cycles)
  );

  wire [ADDRESS_BITS-1:0] left_address, top_address, write_address;
  wire write_valid, write_accumulate;
  wire [SUMS-1:0] write_word;
  gemm_unit #(
      .ROWS(ROWS),
      .COLUMNS(COLUMNS),
      .DATA_BITS(DATA_BITS),
      .ACCUMULATOR_BITS(ACCUMULATOR_BITS),
      .OUTPUT_STATIONARY(OUTPUT_STATIONARY),
      .WEIGHT_SHADOW(WEIGHT_SHADOW),
      .DRAIN_OVERLAP(DRAIN_OVERLAP),
      .DIM_BITS(DIM_BITS),
      .ADDRESS_BITS(ADDRESS_BITS)
  ) gemm (
      .clk(clk),
      .reset(reset),
      .start(compute_start),
      .m(m_table[compute_step]),
      .k(k_table[compute_step]),
      .n(n_table[compute_step]),
      .left_address(left_address),
      .left_word(left_buffers[{left_slots[compute_step], left_address[CAPACITY_BITS-1:0]}]),
      .top_address(top_address),
      .top_word(top_buffers[{top_slots[compute_step], top_address[CAPACITY_BITS-1:0]}]),
      .write_valid(write_valid),
      .write_accumulate(write_accumulate),
      .write_address(write_address),
      .write_word(write_word),
      .done(compute_done)
  );

  // accumulators: a tile's first step writes what its later steps add to
  logic begins;
  logic [1:0] tile_slot;
  wire ends = compute_done && store_table[compute_step] != {BYTES_BITS{1'b0}};
  wire [CAPACITY_BITS+1:0] sum_address = {tile_slot, write_address[CAPACITY_BITS-1:0]};
  wire [SUMS-1:0] stored = accumulators[sum_address];
  wire [SUMS-1:0] summed;
  genvar c;
  generate
    for (c = 0; c < COLUMNS; c = c + 1) begin : column
      localparam LOW = c * ACCUMULATOR_BITS;
      assign summed[LOW+:ACCUMULATOR_BITS] = write_word[LOW+:ACCUMULATOR_BITS] +
          (write_accumulate || !begins ? stored[LOW+:ACCUMULATOR_BITS] : {ACCUMULATOR_BITS{1'b0}});
    end
  endgenerate
  always_ff @(posedge clk) begin
    if (write_valid) accumulators[sum_address] <= summed;
    if (reset) begin
      begins <= 1'b1;
      tile_slot <= 2'd0;
    end else if (compute_done) begin
      begins <= ends;
      if (ends) tile_slot <= tile_slot == buffers - 2'd1 ? 2'd0 : tile_slot + 2'd1;
    end
  end

  // the file's side, and the contents of the DRAM
  /* verilator lint_off BLKSEQ */
  integer requests, answers, read, i, steps_read, buffers_read, latency_read, rate_read, pipelined_read, ties_read;
  integer left_total, top_total, left_from, top_from, words, taken, arrived, leaving, leaving_slot, at;
  logic [LEFT-1:0] left_read;
  logic [TOP-1:0] top_read;
  reg [8*1024-1:0] path;
  logic [2:0] warm_up;

  initial begin
    reset = 1'b1;
    start = 1'b0;
    running = 1'b0;
    warm_up = 3'd7;
    if ($value$plusargs("requests=%s", path) == 0) path = "";
    requests = $fopen(path, "r");
    if ($value$plusargs("answers=%s", path) == 0) path = "";
    answers = $fopen(path, "w");
    if (requests == 0 || answers == 0) begin
      $display("machine_bench: +requests=FILE and +answers=FILE have to be files that can be opened");
      $finish;
    end
  end

  always @(posedge clk) begin
    if (warm_up != 3'd0) begin
      warm_up <= warm_up - 3'd1;
      reset   <= warm_up != 3'd1;
    end else if (reset) begin
      reset <= 1'b0;
      start <= 1'b1;
      running <= 1'b1;
    end else if (running) begin
      start <= 1'b0;
      if (load_take) begin
        while (load_table[taken] == {BYTES_BITS{1'b0}}) taken = taken + 1;
        at = {28'd0, 2'd0, left_slots[taken]} << CAPACITY_BITS;
        for (i = 0; i < left_counts[taken]; i = i + 1) left_buffers[at+i] = {LEFT / 8{8'h5a}};
        at = {28'd0, 2'd0, top_slots[taken]} << CAPACITY_BITS;
        for (i = 0; i < top_counts[taken]; i = i + 1) top_buffers[at+i] = {TOP / 8{8'h5a}};
        taken = taken + 1;
      end
      if (load_done) begin
        while (load_table[arrived] == {BYTES_BITS{1'b0}}) arrived = arrived + 1;
        at = {28'd0, 2'd0, left_slots[arrived]} << CAPACITY_BITS;
        for (i = 0; i < left_counts[arrived]; i = i + 1) left_buffers[at+i] = left_dram[left_from+i];
        left_from = left_from + left_counts[arrived];
        at = {28'd0, 2'd0, top_slots[arrived]} << CAPACITY_BITS;
        for (i = 0; i < top_counts[arrived]; i = i + 1) top_buffers[at+i] = top_dram[top_from+i];
        top_from = top_from + top_counts[arrived];
        arrived  = arrived + 1;
      end
      if (store_done) begin
        while (store_table[leaving] == {BYTES_BITS{1'b0}}) leaving = leaving + 1;
        words = {16'd0, m_table[leaving]} * (({16'd0, n_table[leaving]} + COLUMNS - 1) / COLUMNS);
        at = leaving_slot << CAPACITY_BITS;
        for (i = 0; i < words; i = i + 1) $fwrite(answers, "%h\n", accumulators[at+i]);
        leaving = leaving + 1;
        leaving_slot = leaving_slot == {30'd0, buffers} - 1 ? 0 : leaving_slot + 1;
      end
      if (finished) begin
        $fwrite(answers, "%0d\n", cycles);
        running <= 1'b0;
      end
    end else begin
      read = $fscanf(
          requests, "%d %d %d %d %d %d %d %d\n", steps_read, buffers_read, latency_read, rate_read, pipelined_read,
          ties_read, left_total, top_total
      );
      if (read != 8) begin
        $fclose(answers);
        $finish;
      end else begin
        for (i = 0; i < steps_read; i = i + 1) begin
          read = $fscanf(
              requests, "%d %d %d %d %d %d %d %d %d\n", m_table[i], k_table[i], n_table[i], left_slots[i], top_slots[i],
              left_counts[i], top_counts[i], load_table[i], store_table[i]
          );
        end
        // by way of a variable: Verilator 5.006 reads zeros where $fscanf names an element of more than 64 bits
        for (i = 0; i < left_total; i = i + 1) begin
          read = $fscanf(requests, "%h\n", left_read);
          left_dram[i] = left_read;
        end
        for (i = 0; i < top_total; i = i + 1) begin
          read = $fscanf(requests, "%h\n", top_read);
          top_dram[i] = top_read;
        end
        left_from = 0;
        top_from = 0;
        taken = 0;
        arrived = 0;
        leaving = 0;
        leaving_slot = 0;
        steps <= steps_read[STEP_BITS-1:0];
        buffers <= buffers_read[1:0];
        latency <= latency_read[6:0];
        rate <= rate_read;
        pipelined <= pipelined_read[0];
        ties <= ties_read[0];
        reset <= 1'b1;
      end
    end
  end
endmodule
